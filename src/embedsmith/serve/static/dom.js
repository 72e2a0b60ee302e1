// Elements, and how their texts come to be: always as text nodes. Nothing here or elsewhere on the page parses markup.

/** An element with its attributes, listeners (`onclick`) and children; a string among these becomes a text. */
export function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  set(node, attributes);
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

const SVG = "http://www.w3.org/2000/svg";

/** The same for drawings. */
export function svg(tag, attributes = {}, ...children) {
  const node = document.createElementNS(SVG, tag);
  set(node, attributes);
  node.append(...children.filter((child) => child));
  return node;
}

function set(node, attributes) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(name, value);
  }
}

export const $ = (id) => document.getElementById(id);

/** A bar that is `share` (0 to 1) of its room; its colour comes from `kind`. */
export function bar(share, kind) {
  const fill = el("span", { class: `fill ${kind}` });
  fill.style.setProperty("--share", String(Math.max(0, Math.min(1, share || 0))));
  return el("span", { class: "track", "aria-hidden": "true" }, fill);
}

/** Name of the class that colours a head. */
export const colour = (head) => (["dense", "sparse", "multivector"].includes(head) ? head : "other-head");

export const still = () => matchMedia("(prefers-reduced-motion: reduce)").matches;

/** A menu with a label. `choices`: value to words. */
export function menu(label, choices, chosen, onchange) {
  const select = el("select", { onchange: () => onchange(select.value) });
  for (const [value, words] of choices) select.append(el("option", { value, selected: value === chosen }, words));
  return el("label", { class: "field" }, el("span", {}, label), select);
}

/** Calls `work` when nothing has asked for it for `wait` milliseconds. */
export function later(work, wait) {
  let timer = 0;
  return (...values) => {
    clearTimeout(timer);
    timer = setTimeout(() => work(...values), wait);
  };
}

let hide = 0;

/** A short word at the foot of the page. */
export function toast(words, bad = false) {
  const box = $("toast");
  box.textContent = words;
  box.classList.toggle("bad", bad);
  box.classList.add("shown");
  clearTimeout(hide);
  hide = setTimeout(() => box.classList.remove("shown"), 5000);
}
