// Settings: kept in this browser only; the API key in this tab only.

const STORE = "glm45.settings";
const KEY = "glm45.key";
const DEFAULTS = { system: "", thinking: "auto", temperature: "", top_p: "", top_k: "", min_p: "", repetition_penalty: "", seed: "", max_tokens: "", thinking_budget: "", tools: "", theme: "auto" };
const THINKING = ["auto", "on", "off"];
const EXAMPLE = [
  {
    type: "function",
    function: {
      name: "get_weather",
      description: "Current weather of a city.",
      parameters: { type: "object", properties: { city: { type: "string" }, unit: { enum: ["celsius", "fahrenheit"] } }, required: ["city"] },
    },
  },
];

const $ = (id) => document.getElementById(id);
const form = $("settings-form");
const dark = matchMedia("(prefers-color-scheme: dark)");

export class Settings {
  constructor(onChange) {
    this.onChange = onChange;
    this.values = { ...DEFAULTS, ...JSON.parse(localStorage.getItem(STORE) ?? "{}") };
    form.addEventListener("input", (event) => this.read(event.target));
    form.addEventListener("submit", (event) => event.preventDefault());
    $("tools-example").addEventListener("click", () => this.set("tools", JSON.stringify(EXAMPLE, null, 2)));
    $("defaults").addEventListener("click", () => { this.values = { ...DEFAULTS }; this.show(); });
    $("open-settings").addEventListener("click", () => this.toggle());
    $("close-settings").addEventListener("click", () => this.toggle(false));
    $("veil").addEventListener("click", () => this.toggle(false));
    dark.addEventListener("change", () => this.show());
    this.show();
  }

  get key() {
    return sessionStorage.getItem(KEY) ?? "";
  }

  set(name, value) {
    this.values[name] = value;
    this.show();
  }

  // Only what was changed: a slider that nobody moved leaves its setting to the server.
  read(field) {
    if (field.name === "key") sessionStorage.setItem(KEY, field.value);
    else this.values[field.name] = field.value;
    this.show(false);
  }

  show(fill = true) {
    if (fill) {
      for (const [name, value] of Object.entries(this.values)) {
        const field = form.elements.namedItem(name);
        if (field) field.value = value || (field.defaultValue ?? "");
      }
      form.elements.namedItem("key").value = this.key;
    }
    for (const slider of form.querySelectorAll(".slider")) {
      const value = this.values[slider.querySelector("input").name];
      slider.querySelector("output").value = value === "" ? "default" : Number(value).toFixed(2);
    }
    const { theme } = this.values;
    document.documentElement.dataset.theme = theme === "auto" ? (dark.matches ? "dark" : "light") : theme;
    $("tools-error").hidden = !this.toolsProblem;
    $("tools-error").textContent = this.toolsProblem ?? "";
    localStorage.setItem(STORE, JSON.stringify(this.values));
    this.onChange(this);
  }

  toggle(open = $("settings").hidden) {
    $("settings").hidden = $("veil").hidden = !open;
    document.body.classList.toggle("with-settings", open);
    $("open-settings").setAttribute("aria-expanded", open);
    if (open) form.elements.namedItem("system").focus();
    else $("input").focus();
  }

  nextThinking() {
    this.set("thinking", THINKING[(THINKING.indexOf(this.values.thinking) + 1) % THINKING.length]);
  }

  get tools() {
    const text = this.values.tools.trim();
    if (!text) return [];
    const tools = JSON.parse(text);
    if (!Array.isArray(tools)) throw new Error("a list is needed: [ ... ]");
    return tools;
  }

  get toolsProblem() {
    try {
      void this.tools;
      return null;
    } catch (error) {
      return `These are no tools: ${error.message}`;
    }
  }

  // The part of a request that the settings decide.
  request(messages) {
    const { values } = this;
    const body = { messages: values.system.trim() ? [{ role: "system", content: values.system.trim() }, ...messages] : messages };
    for (const name of ["temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "max_tokens", "thinking_budget"]) {
      if (values[name] !== "") body[name] = Number(values[name]);
    }
    if (values.thinking !== "auto") body.thinking = { type: values.thinking === "on" ? "enabled" : "disabled" };
    if (values.thinking === "off") delete body.thinking_budget;
    if (this.tools.length) body.tools = this.tools;
    return body;
  }
}
