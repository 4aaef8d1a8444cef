// %date:yyyy-MM-dd% and %Node.widget% in the file names of Save Pairs, which the page replaces for ComfyUI's own nodes
// only.
import { app } from "../../../scripts/app.js";
import { applyTextReplacements } from "../../../scripts/utils.js";
import { widget } from "./shared.js";

app.registerExtension({
  name: "prompt-to-prompt.save",
  nodeCreated(node) {
    if (node.comfyClass !== "P2PSavePairs") return;
    const prefix = widget(node, "filename_prefix");
    prefix.serializeValue = () => applyTextReplacements(app, prefix.value);
  },
});
