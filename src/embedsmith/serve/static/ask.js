// Asking: the question, the two sides that answer it, and the weights of their heads.
//
// The server gives more hits than are shown, each with the score of every head. So when a weight moves, the order is
// made anew here at once, and the server is asked a moment later: with other weights it may find other documents.

import { Card } from "./card.js";
import { $, colour, el, later, menu, still, toast } from "./dom.js";
import * as marks from "./marks.js";
import { post } from "./server.js";
import { headName, number, t } from "./words.js";

const CANDIDATES = 30;
const PAGE = 10;
const NEXT_TO_NOTHING = 1e-9; // the weight 0 to the server, so that the head's scores are known when it is raised
const HAS_PARTS = ["sparse", "multivector"];

let about = null;
let question = "";
let comparing = false;
let phone = "A"; // the side that a narrow screen shows
let sides = [];

/** The hits of the last question on side A, for the map. */
export const lastHits = () => (sides[0] ? ordered(sides[0]).slice(0, PAGE) : []);

class Side {
  constructor(name, model) {
    this.name = name;
    this.rerank = false;
    this.hits = [];
    this.tokens = new Map();
    this.cards = new Map();
    this.shown = PAGE;
    this.seconds = 0;
    this.choose(model);
  }

  choose(model) {
    this.model = model;
    this.weights = { ...model.weights };
  }

  get weighted() {
    return this.model.heads.length > 1;
  }

  get allZero() {
    return this.weighted && !this.rerank && Object.values(this.weights).every((weight) => weight === 0);
  }
}

export function start(facts) {
  about = facts;
  $("ask-form").addEventListener("submit", (event) => {
    event.preventDefault();
    ask($("question").value);
  });
  if (about.index === null) return;
  const first = about.models.find((model) => model.name === about.index.model) ?? about.models[0];
  sides = [new Side("A", first), new Side("B", first)];
  const other = about.models.find((model) => model.name !== first.name);
  if (other) sides[1].choose(other);
  else if (sides[1].weighted) for (const head of first.heads.slice(1)) sides[1].weights[head] = 0;
  else sides[1].rerank = about.reranker;
}

const comparable = () => about.models.length > 1 || sides[0].weighted || about.reranker;
const active = () => (comparing ? sides : sides.slice(0, 1));

/** Asks a question, whoever it comes from. */
export async function ask(text) {
  const given = text.trim();
  $("question").value = text;
  if (!given || about === null || about.index === null) return;
  question = given;
  for (const side of sides) Object.assign(side, { hits: [], shown: PAGE, tokens: new Map(), asked: false });
  for (const side of sides) forget(side);
  document.body.classList.add("asked");
  await Promise.all(active().map((side) => search(side)));
}

/** Draws everything anew, in the language of now. */
export function render() {
  if (about === null) return;
  const index = about.index;
  if (index === null) $("about").textContent = t("no_index");
  else {
    const heads = index.heads.map(headName).join(t("comma"));
    const values = { documents: number(index.documents), heads, model: index.model };
    $("about").textContent = t("about_index", values);
  }
  $("question").disabled = $("ask-form").querySelector("button").disabled = index === null;
  if (index === null) return;
  for (const side of sides) forget(side);
  options();
  layout();
}

function options() {
  const box = $("options");
  box.hidden = !comparable();
  const toggle = el("input", { type: "checkbox", role: "switch", id: "compare", checked: comparing });
  toggle.addEventListener("change", async () => {
    comparing = toggle.checked;
    phone = "A";
    for (const side of sides) forget(side);
    layout();
    if (comparing && question && !sides[1].asked) await search(sides[1]);
  });
  box.replaceChildren(el("label", { class: "switch" }, toggle, el("span", {}, t("compare"))));
}

function layout() {
  const tabs = $("side-tabs");
  tabs.hidden = !comparing;
  tabs.replaceChildren(
    ...sides.map((side) =>
      el("button", { type: "button", "aria-pressed": String(phone === side.name), onclick: () => turn(side.name) },
        t("side", { name: side.name })),
    ),
  );
  const box = $("sides");
  box.classList.toggle("two", comparing);
  box.dataset.phone = phone;
  box.replaceChildren(...active().map(frame));
  active().forEach(draw);
}

function turn(name) {
  phone = name;
  $("sides").dataset.phone = name;
  for (const [place, button] of [...$("side-tabs").children].entries())
    button.setAttribute("aria-pressed", String(sides[place].name === name));
}

function frame(side) {
  const label = comparing ? t("side", { name: side.name }) : t("search");
  side.list = el("ol", { class: "hits", "aria-label": comparing ? t("hits_of", { name: side.name }) : label, "aria-description": about.feedback ? t("keys_hint") : null });
  side.list.addEventListener("keydown", (event) => keys(event, side));
  side.note = el("p", { class: "soft note-line" });
  side.moreButton = el("button", { type: "button", class: "quiet more-hits", onclick: () => more(side) });
  const controls = el("div", { class: "controls" });
  if (comparing) controls.append(el("h2", { class: "side-name" }, label));
  if (about.models.length > 1) controls.append(models(side));
  if (about.reranker) controls.append(reranks(side));
  if (side.weighted) controls.append(weights(side), reset(side));
  const plain = controls.childElementCount === 0;
  return el("section", { class: "side", "data-side": side.name, "aria-label": label },
    plain ? null : controls, side.note, side.list, side.moreButton,
    about.feedback ? el("p", { class: "keys-hint", "aria-hidden": "true" }, t("keys_hint")) : null);
}

function models(side) {
  const choices = about.models.map((model) => [model.name, model.name]);
  return menu(t("model"), choices, side.model.name, async (name) => {
    side.choose(about.models.find((model) => model.name === name));
    forget(side);
    layout();
    await search(side);
  });
}

function reranks(side) {
  const box = el("input", { type: "checkbox", role: "switch", checked: side.rerank });
  box.addEventListener("change", () => {
    side.rerank = box.checked;
    side.list.closest(".side").classList.toggle("reranked", side.rerank);
    search(side);
  });
  return el("label", { class: "switch" }, box, el("span", {}, t("rerank")));
}

function weights(side) {
  const box = el("fieldset", { class: "weights" });
  const again = later(() => search(side, true), 350);
  for (const head of side.model.heads) {
    const told = el("output", {}, number(side.weights[head], 2));
    const range = el("input", {
      type: "range", min: "0", max: "2", step: "0.05", value: side.weights[head], class: colour(head),
      "aria-label": t("weight_of", { head: headName(head) }), "data-head": head,
    });
    range.addEventListener("input", () => {
      side.weights[head] = Number(range.value);
      told.textContent = number(side.weights[head], 2);
      active().forEach(draw);
      if (!side.allZero) again();
    });
    box.append(el("label", { class: "weight" }, el("span", { class: `dot ${colour(head)}` }), el("span", {}, headName(head)), range, told));
  }
  return box;
}

function reset(side) {
  const work = () => {
    side.weights = { ...side.model.weights };
    layout();
    search(side, true);
  };
  return el("button", { type: "button", class: "quiet small", onclick: work }, t("reset"));
}

async function search(side, quiet = false) {
  if (!question || side.allZero) return;
  side.asking?.abort();
  const mine = (side.asking = new AbortController());
  side.asked = true;
  if (!quiet) $("ask-status").textContent = t("looking");
  const began = performance.now();
  try {
    const found = await post("search", body(side, CANDIDATES, false), mine.signal);
    side.hits = found.hits;
    side.seconds = (performance.now() - began) / 1000;
    draw(side);
    if (comparing) draw(sides[side === sides[0] ? 1 : 0]);
    tell();
    document.dispatchEvent(new Event("asked"));
    explain(side, mine.signal);
  } catch (problem) {
    if (problem.name === "AbortError") return;
    side.hits = [];
    draw(side);
    $("ask-status").textContent = problem.message;
  }
}

/** The tokens that matched, of the hits that are shown: taking a hit apart costs the server more than finding it. */
async function explain(side, signal) {
  const wanted = ordered(side).slice(0, side.shown);
  const parts = side.model.heads.some((head) => HAS_PARTS.includes(head));
  if (!parts || wanted.every((hit) => side.tokens.has(hit.id))) return;
  try {
    const found = await post("search", body(side, side.shown, true), signal);
    for (const hit of found.hits) side.tokens.set(hit.id, hit.tokens ?? []);
    draw(side);
  } catch (problem) {
    if (problem.name !== "AbortError") toast(problem.message, true); // the hits are there all the same
  }
}

function body(side, k, explained) {
  const asked = { query: question, k, explain: explained };
  if (about.models.length > 1) asked.model = side.model.name;
  const zero = Object.values(side.weights).every((weight) => weight === 0); // all the same to a reranker
  if (side.weighted && !zero) asked.weights = Object.fromEntries(side.model.heads.map((head) => [head, Math.max(side.weights[head], NEXT_TO_NOTHING)]));
  if (about.reranker) asked.rerank = side.rerank;
  return asked;
}

/** The hits in the order of the weights of now. */
function ordered(side) {
  if (side.rerank || !side.weighted) return side.hits;
  const scored = side.hits.map((hit) => ({ ...hit, score: fused(side, hit) }));
  return scored.sort((one, other) => other.score - one.score || (one.id < other.id ? -1 : 1));
}

const fused = (side, hit) =>
  side.model.heads.reduce((sum, head) => sum + side.weights[head] * (hit.heads[head] ?? 0), 0);

function draw(side) {
  if (!side.list?.isConnected) return;
  side.list.closest(".side").classList.toggle("reranked", side.rerank);
  side.note.textContent = side.allZero ? t("all_zero") : note(side);
  side.note.hidden = !side.note.textContent;
  const hits = ordered(side);
  const shown = hits.slice(0, side.shown);
  const was = new Map([...side.cards].map(([id, card]) => [id, card.node.getBoundingClientRect().top]));
  const most = Math.max(1e-9, ...shown.flatMap((hit) => side.model.heads.map((head) => share(side, hit, head))));
  const before = side.name === "B" && comparing ? new Map(ordered(sides[0]).map((hit, place) => [hit.id, place])) : null;
  const kept = new Set(shown.map((hit) => hit.id));
  for (const [id, card] of side.cards) if (!kept.has(id)) (card.node.remove(), side.cards.delete(id));
  shown.forEach((hit, place) => {
    if (!side.cards.has(hit.id)) side.cards.set(hit.id, new Card(hit, { question, feedback: about.feedback }));
    const card = side.cards.get(hit.id);
    card.update(hit, place, {
      heads: side.model.heads.map((head) => ({ head, score: hit.heads[head], weight: side.weights[head] ?? 1, share: share(side, hit, head) / most })),
      tokens: side.tokens.get(hit.id),
      was: before === null || !sides[0].hits.length ? undefined : (before.get(hit.id) ?? null),
      fused: side.weighted || side.rerank,
    });
    if (side.list.children[place] !== card.node) side.list.insertBefore(card.node, side.list.children[place] ?? null);
  });
  glide(side, was);
  const left = Math.min(PAGE, hits.length - shown.length);
  side.moreButton.hidden = left <= 0;
  side.moreButton.textContent = t("more", { count: left });
}

const share = (side, hit, head) => Math.max(0, (side.weighted ? side.weights[head] : 1) * (hit.heads[head] ?? 0));

/** Cards that moved slide to their new place. */
function glide(side, was) {
  if (still()) return;
  for (const [id, card] of side.cards) {
    const from = was.get(id);
    const way = from === undefined ? 0 : from - card.node.getBoundingClientRect().top;
    if (Math.abs(way) > 2)
      card.node.animate([{ transform: `translateY(${way}px)` }, { transform: "none" }], { duration: 260, easing: "ease-out" });
  }
}

function note(side) {
  if (side.name !== "B" || !comparing || !side.hits.length || !sides[0].hits.length) return "";
  const [mine, theirs] = [side, sides[0]].map((each) => ordered(each).slice(0, PAGE).map((hit) => hit.id));
  return t("same", { same: mine.filter((id) => theirs.includes(id)).length, count: mine.length });
}

function tell() {
  const side = sides[0];
  const values = { count: number(side.hits.length), seconds: number(side.seconds, 2) };
  $("ask-status").textContent = side.hits.length ? t("found", values) : t("nothing");
}

function more(side) {
  const first = side.shown;
  side.shown += PAGE;
  draw(side);
  side.list.children[first]?.focus();
  explain(side);
}

function forget(side) {
  side.cards.clear();
  side.list?.replaceChildren();
}

/** Arrow keys go from hit to hit; plus and minus mark the one in focus. */
function keys(event, side) {
  const cards = [...side.list.children];
  const place = cards.indexOf(document.activeElement);
  if (place < 0 || event.ctrlKey || event.metaKey || event.altKey) return;
  const to = { ArrowDown: place + 1, ArrowUp: place - 1, Home: 0, End: cards.length - 1 }[event.key];
  if (to !== undefined) cards[to]?.focus();
  else if (event.key === "+" || event.key === "-") side.cards.get(ordered(side)[place].id).mark(event.key === "+" ? 1 : -1);
  else return;
  event.preventDefault();
}

marks.whenChanged(() => sides.forEach((side) => side.cards.forEach((card) => card.showMark())));
