// Shows on Prompt Pair and Add Target which words share their attention maps, as the node found it when it last ran.
import { app } from "../../scripts/app.js";
import { ComfyWidgets } from "../../scripts/widgets.js";

const WIDGET = "alignment";

function alignmentWidget(node) {
  const existing = node.widgets?.find((widget) => widget.name === WIDGET);
  if (existing) return existing;
  const options = ["STRING", { multiline: true, serialize: false }];
  const { widget } = ComfyWidgets.STRING(node, WIDGET, options, app);
  widget.serialize = false; // not a value of the node: kept out of saved workflows and of the prompt
  widget.options.serialize = false;
  const element = widget.inputEl ?? widget.element;
  if (element) {
    element.readOnly = true;
    element.setAttribute("aria-label", "Alignment of source and target");
    element.placeholder = "The alignment of the two prompts appears here after a run.";
  }
  return widget;
}

app.registerExtension({
  name: "prompt-to-prompt.alignment",
  nodeCreated(node) {
    if (!["P2PPromptPair", "P2PAddTarget"].includes(node.comfyClass)) return;
    alignmentWidget(node);
    const onExecuted = node.onExecuted;
    node.onExecuted = function (message) {
      onExecuted?.apply(this, arguments);
      const text = message?.text?.join("\n");
      if (text === undefined) return;
      alignmentWidget(this).value = text;
      this.setDirtyCanvas(true);
    };
  },
});
