// The conversation on screen. A turn is built once and then updated, so that what a reader has opened or selected stays.

import { copy, element, icon, markdown } from "./markdown.js";

function action(name, label, run) {
  const button = element("button", { type: "button", title: label, "aria-label": label }, icon(name));
  button.addEventListener("click", () => run(button));
  return button;
}

export class UserTurn {
  constructor(message, handlers) {
    this.message = message;
    this.handlers = handlers;
    this.node = element("li", { class: "turn user" });
    this.show();
  }

  show() {
    const { message, handlers } = this;
    this.node.replaceChildren(
      element("div", { class: "bubble" }, message.content),
      element("div", { class: "actions" },
        action("copy", "Copy", (button) => copy(message.content, button)),
        action("edit", "Edit and send again", () => this.edit()),
      ),
    );
  }

  edit() {
    const area = element("textarea", { "aria-label": "Edit message" });
    area.value = this.message.content;
    const done = () => this.handlers.edit(this.message, area.value);
    area.addEventListener("keydown", (event) => {
      if (event.key === "Escape") { event.stopPropagation(); this.show(); }
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); done(); }
    });
    this.node.replaceChildren(
      element("div", { class: "edit" }, area,
        element("div", {},
          element("button", { class: "button quiet", type: "button", onclick: () => this.show() }, "Cancel"),
          element("button", { class: "button", type: "button", onclick: done }, "Send"),
        ),
      ),
    );
    area.style.height = `${Math.min(area.scrollHeight + 4, 400)}px`;
    area.focus();
    area.setSelectionRange(area.value.length, area.value.length);
  }
}

export class AssistantTurn {
  constructor(message, handlers) {
    this.message = message;
    this.handlers = handlers;
    this.calls = [];
    this.touched = false;
    this.foldLabel = element("span");
    this.foldInside = element("div", { class: "inside" });
    this.fold = element("details", { class: "fold" }, element("summary", {}, icon("chevron"), this.foldLabel), this.foldInside);
    this.fold.querySelector("summary").addEventListener("click", () => { this.touched = true; });
    this.prose = element("div", { class: "prose" });
    this.waiting = element("span", { class: "caret", role: "img", "aria-label": "Waiting for the model" });
    this.callList = element("div");
    this.figures = element("span", { class: "figures" });
    this.actions = element("div", { class: "actions" },
      action("copy", "Copy", (button) => copy(this.message.content ?? "", button)),
      action("retry", "Answer again", () => handlers.retry(this.message)),
      this.figures,
    );
    this.node = element("li", { class: "turn assistant" }, this.fold, this.prose, this.waiting, this.callList, this.actions);
  }

  update(live, results) {
    const { message } = this;
    const thinking = live && !message.content && !message.tool_calls?.length;
    this.fold.hidden = !message.reasoning_content;
    this.fold.classList.toggle("live", thinking);
    this.foldLabel.textContent = thinking ? "Thinking" : thoughtFor(message);
    if (this.foldInside.textContent !== message.reasoning_content) this.foldInside.textContent = message.reasoning_content ?? "";
    if (!this.touched) this.fold.open = thinking;
    this.waiting.hidden = !(thinking && !message.reasoning_content);
    patch(this.prose, markdown(message.content ?? ""));
    (message.tool_calls ?? []).forEach((call, index) => {
      this.calls[index] ??= new CallCard(call, this.callList, () => this.sendResults());
      this.calls[index].update(live, results?.get(call.id));
    });
    this.offerSending(live, results);
    this.actions.hidden = live;
    this.figures.textContent = message._figures ?? "";
  }

  offerSending(live, results) {
    const open = this.calls.some((card) => !results?.has(card.call.id));
    if (this.calls.length && open && !live && !this.sendButton) {
      const label = this.calls.length > 1 ? "Send results" : "Send result";
      const button = element("button", { class: "button", type: "button", onclick: () => this.sendResults() }, label);
      this.sendButton = element("div", { class: "call-send" }, button);
      this.callList.append(this.sendButton);
    } else if (!open && this.sendButton) {
      this.sendButton.remove();
      this.sendButton = null;
    }
  }

  sendResults() {
    this.handlers.results(this.message, this.calls.map((card) => card.answer()));
  }
}

class CallCard {
  constructor(call, parent, send) {
    this.call = call;
    this.send = send;
    this.state = element("span", { class: "state" });
    this.name = element("span");
    this.arguments = element("pre", { tabindex: 0 });
    this.result = element("div", { class: "result" });
    parent.append(element("section", { class: "call" },
      element("div", { class: "call-head" }, icon("tool"), this.name, this.state), this.arguments, this.result));
  }

  update(live, result) {
    this.name.textContent = this.call.function.name;
    this.arguments.textContent = pretty(this.call.function.arguments);
    this.state.textContent = live ? "writing" : result === undefined ? "waits for a result" : "done";
    if (result !== undefined) {
      const fold = element("details", { class: "fold" }, element("summary", {}, icon("chevron"), element("span", {}, "Result")), element("pre", {}, result));
      if (!this.result.querySelector("details")) this.result.replaceChildren(fold);
    } else if (!live && !this.area) {
      this.area = element("textarea", { "aria-label": `Result of ${this.call.function.name}`, placeholder: "What does it return?", rows: 2 });
      this.area.addEventListener("keydown", (event) => {
        if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); this.send(); }
      });
      this.result.replaceChildren(this.area);
    }
  }

  answer() {
    return { role: "tool", tool_call_id: this.call.id, content: this.area?.value ?? "" };
  }
}

function pretty(json) {
  try {
    const value = JSON.parse(json);
    return Object.keys(value).length ? JSON.stringify(value, null, 2) : "no arguments";
  } catch {
    return json; // still being written
  }
}

function thoughtFor(message) {
  const seconds = message._thoughtSeconds;
  if (seconds === undefined) return "Thoughts";
  return seconds < 1 ? "Thought for a moment" : `Thought for ${seconds < 60 ? `${Math.round(seconds)} s` : `${Math.floor(seconds / 60)} min ${Math.round(seconds % 60)} s`}`;
}

// Replace only what changed: equal nodes stay, with the reader's selection in them.
function patch(parent, nodes) {
  nodes.forEach((node, index) => {
    const old = parent.childNodes[index];
    if (!old) parent.append(node);
    else if (!old.isEqualNode(node)) old.replaceWith(node);
  });
  while (parent.childNodes.length > nodes.length) parent.lastChild.remove();
}
