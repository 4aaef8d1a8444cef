// Names and tooltips of the pack's nodes in the page's language. The page reads them itself from the same files, but
// some of its versions (1.32.9 is one) forget packs' translations when they load the user's language.
import { app } from "../../../scripts/app.js";
import { nodeTexts } from "./shared.js";

let texts = {};

app.registerExtension({
  name: "prompt-to-prompt.languages",

  async addCustomNodeDefs(definitions) {
    texts = await nodeTexts;
    for (const [id, { display_name, description, inputs }] of Object.entries(texts)) {
      const definition = id.startsWith("P2P") ? definitions[id] : undefined;
      if (!definition) continue;
      Object.assign(definition, { display_name, description });
      for (const group of Object.values(definition.input ?? {}))
        for (const [name, spec] of Object.entries(group))
          if (inputs?.[name] && spec[1]) spec[1].tooltip = inputs[name].tooltip;
    }
  },

  nodeCreated(node) {
    const own = node.comfyClass?.startsWith("P2P") ? texts[node.comfyClass] : undefined;
    if (!own) return;
    for (const each of [...(node.widgets ?? []), ...(node.inputs ?? [])]) {
      const name = own.inputs?.[each.name]?.name;
      if (!name) continue;
      if ("link" in each) each.localized_name = name;
      else if (!each.label || each.label === each.name) each.label = name;
    }
    node.outputs?.forEach((output, n) => {
      output.localized_name = own.outputs?.[n]?.name ?? output.localized_name;
    });
  },
});
