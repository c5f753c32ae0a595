// Markdown to DOM nodes. No HTML is ever parsed, so nothing that a model writes can run.

const INLINE = new RegExp(
  [
    "(?<code>`+)(?<codeText>[^`]|[^`][\\s\\S]*?[^`])\\k<code>(?!`)",
    "<\\|begin_of_box\\|>(?<box>[\\s\\S]*?)<\\|end_of_box\\|>",
    "\\*\\*(?<strong>(?=\\S)[\\s\\S]*?\\S)\\*\\*",
    "\\*(?<em>(?=[^\\s*])[^*]*?[^\\s*]|[^\\s*])\\*(?!\\*)",
    "(?<![\\w])_(?<em2>(?=\\S)[^_]*?\\S)_(?![\\w])",
    "~~(?<del>(?=\\S)[\\s\\S]*?\\S)~~",
    "\\[(?<label>[^\\]\\n]+)\\]\\((?<href>[^\\s)]+)(?:\\s+\"[^\"]*\")?\\)",
    "(?<url>https?://[^\\s<>)\\]]+[^\\s<>)\\].,;:!?'\"])",
    "\\\\(?<escaped>[\\\\`*_{}\\[\\]()#+.!|>~-])",
    "(?<br> {2,}\\n|\\n)",
  ].join("|"),
  "g",
);

export function element(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "class") node.className = value;
    else if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value !== null && value !== false) node.setAttribute(key, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#i-${name}`);
  svg.setAttribute("aria-hidden", "true");
  svg.append(use);
  return svg;
}

export async function copy(text, button) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Without https the clipboard is closed to pages; the old way still works.
    const area = element("textarea", { class: "hidden" });
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  const use = button.querySelector("use");
  use.setAttribute("href", "#i-check");
  setTimeout(() => use.setAttribute("href", "#i-copy"), 1400);
}

export function inline(text) {
  const nodes = [];
  let at = 0;
  for (const match of text.matchAll(INLINE)) {
    if (match.index > at) nodes.push(text.slice(at, match.index));
    at = match.index + match[0].length;
    nodes.push(inlineNode(match.groups, match[0]));
  }
  if (at < text.length) nodes.push(text.slice(at));
  return nodes;
}

function inlineNode(found, written) {
  if (found.code) return element("code", {}, found.codeText.replace(/^ (.+) $/s, "$1"));
  if (found.box !== undefined) return element("span", { class: "box" }, ...inline(found.box.trim()));
  if (found.strong) return element("strong", {}, ...inline(found.strong));
  if (found.em || found.em2) return element("em", {}, ...inline(found.em || found.em2));
  if (found.del) return element("del", {}, ...inline(found.del));
  if (found.url) return link(found.url, [found.url]);
  if (found.escaped) return found.escaped;
  if (found.br) return element("br");
  if (found.label) return link(found.href, inline(found.label));
  return written;
}

function link(href, children) {
  const safe = /^(https?:|mailto:)/i.test(href);
  return safe ? element("a", { href, target: "_blank", rel: "noopener noreferrer" }, ...children) : element("span", {}, ...children);
}

// Blocks. Each rule looks at the line where it stands and, if it fits, returns the node and the line after it.

const RULES = [fence, heading, rule, quote, list, table];

export function markdown(text) {
  return blocks(text.replace(/\r\n?/g, "\n").split("\n"));
}

function blocks(lines) {
  const nodes = [];
  let paragraph = [];
  const close = () => {
    if (paragraph.length) nodes.push(element("p", {}, ...inline(paragraph.join("\n"))));
    paragraph = [];
  };
  for (let at = 0; at < lines.length; ) {
    if (!lines[at].trim()) {
      close();
      at += 1;
      continue;
    }
    const found = RULES.reduce((done, one) => done || one(lines, at, paragraph.length > 0), null);
    if (found) {
      close();
      nodes.push(found.node);
      at = found.next;
    } else {
      paragraph.push(lines[at].trimStart());
      at += 1;
    }
  }
  close();
  return nodes;
}

function fence(lines, at) {
  const open = lines[at].match(/^( {0,3})(`{3,}|~{3,})\s*([^`]*)$/);
  if (!open) return null;
  const [, indent, marks, info] = open;
  const closing = new RegExp(`^ {0,3}${marks[0]}{${marks.length},}\\s*$`);
  let next = at + 1;
  const body = [];
  while (next < lines.length && !closing.test(lines[next])) body.push(lines[next++].replace(new RegExp(`^ {0,${indent.length}}`), ""));
  return { node: codeBlock(body.join("\n"), info.trim().split(/\s+/)[0]), next: next + 1 };
}

export function codeBlock(text, language) {
  const button = element("button", { type: "button", "aria-label": "Copy code" }, icon("copy"), "Copy");
  button.addEventListener("click", () => copy(text, button));
  return element("div", { class: "block" }, element("header", {}, language || "text", button), element("pre", { tabindex: 0 }, element("code", {}, text)));
}

function heading(lines, at) {
  const found = lines[at].match(/^ {0,3}(#{1,6})\s+(.*?)\s*#*\s*$/);
  return found && { node: element(`h${Math.min(found[1].length, 4)}`, {}, ...inline(found[2])), next: at + 1 };
}

function rule(lines, at) {
  return /^ {0,3}([-*_])(\s*\1){2,}\s*$/.test(lines[at]) ? { node: element("hr"), next: at + 1 } : null;
}

function quote(lines, at) {
  if (!/^ {0,3}>/.test(lines[at])) return null;
  let next = at;
  const body = [];
  while (next < lines.length && /^ {0,3}>/.test(lines[next])) body.push(lines[next++].replace(/^ {0,3}> ?/, ""));
  return { node: element("blockquote", {}, ...blocks(body)), next };
}

const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])(\s+|$)(.*)$/;

function list(lines, at, inParagraph) {
  const first = lines[at].match(ITEM);
  if (!first || (inParagraph && /\d/.test(first[2]) && !/^1[.)]/.test(first[2]))) return null;
  const ordered = /\d/.test(first[2]);
  const items = [];
  let next = at;
  while (next < lines.length) {
    const item = lines[next].match(ITEM);
    if (item && item[1].length <= first[1].length + 1) {
      if (/\d/.test(item[2]) !== ordered) break;
      items.push({ indent: item[1].length + item[2].length + 1, lines: [item[4]] });
    } else if (!lines[next].trim()) {
      const following = lines.slice(next).find((line) => line.trim());
      if (following === undefined || !(ITEM.test(following) || /^\s{2,}/.test(following))) break;
      items.at(-1).lines.push("");
    } else if (item || /^\s{2,}/.test(lines[next]) || lines[next - 1].trim()) {
      if (!item && !/^\s/.test(lines[next]) && (heading(lines, next) || fence(lines, next) || rule(lines, next))) break;
      items.at(-1).lines.push(lines[next].replace(new RegExp(`^\\s{0,${items.at(-1).indent}}`), ""));
    } else break;
    next += 1;
  }
  const attributes = ordered && !/^1\D/.test(first[2]) ? { start: parseInt(first[2], 10) } : {};
  return { node: element(ordered ? "ol" : "ul", attributes, ...items.map((item) => element("li", {}, ...tight(blocks(item.lines))))), next };
}

function tight(nodes) {
  // A list item's only paragraph needs no space of its own.
  return nodes[0]?.tagName === "P" ? [...nodes[0].childNodes, ...nodes.slice(1)] : nodes;
}

function table(lines, at) {
  const divider = lines[at + 1];
  if (!lines[at].includes("|") || !divider || !/^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/.test(divider) || !divider.includes("-")) return null;
  const cells = (line) => line.trim().replace(/^\||\|$/g, "").split(/(?<!\\)\|/).map((cell) => cell.trim());
  const row = (line, name) => element("tr", {}, ...cells(line).map((cell) => element(name, {}, ...inline(cell))));
  let next = at + 2;
  const body = [];
  while (next < lines.length && lines[next].includes("|")) body.push(row(lines[next++], "td"));
  return { node: element("div", { class: "table" }, element("table", {}, element("thead", {}, row(lines[at], "th")), element("tbody", {}, ...body))), next };
}
