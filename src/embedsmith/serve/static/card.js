// One hit: its text with the matched words marked, a bar for every head, the tokens that matched, and two thumbs.

import { bar, colour, el, svg } from "./dom.js";
import * as marks from "./marks.js";
import { headName, number, signed, t } from "./words.js";

const TOKENS = 8;
const FIELDS = 4;
const MARKED = 0.7; // of the strongest match: weaker ones are no words to mark
const SIGN = /^(\[[A-Z]+\]|<\/?[a-z_|]+>)$/; // of the tokenizer, such as [SEP]
const UP = "M7 10v10H4V10zM7 11l4-8c1.6 0 2.6 1.1 2.4 2.7L13 9h5.2c1.3 0 2.2 1.2 1.9 2.4l-1.7 7A2.2 2.2 0 0 1 16.3 20H7";

export class Card {
  constructor(hit, { question, feedback }) {
    Object.assign(this, { hit, question });
    this.rank = el("span", { class: "rank" });
    this.moved = el("span", { class: "moved" });
    this.score = el("span", { class: "score" });
    this.text = el("p", { class: "text", dir: "auto" });
    this.heads = el("div", { class: "heads" });
    this.tokens = el("div", { class: "tokens" });
    this.wholeButton = el("button", { type: "button", class: "link", "aria-expanded": "false", onclick: () => this.turn() }, t("whole"));
    this.thumbs = feedback ? [1, -1].map((vote) => this.thumb(vote)) : [];
    this.node = el("li", { class: "hit", tabindex: "0" },
      el("div", { class: "head" }, this.rank, this.moved, el("span", { class: "id" }, hit.id), this.fields(), this.score),
      this.text, this.wholeButton, this.tokens,
      el("div", { class: "foot" }, this.heads, feedback ? el("div", { class: "thumbs" }, this.thumbs) : null));
    this.words = "";
    this.fill([]);
    this.showMark();
    new ResizeObserver(() => this.measure()).observe(this.text);
  }

  fields() {
    const shown = Object.entries(this.hit.fields ?? {}).filter(([, value]) => ["string", "number", "boolean"].includes(typeof value));
    return el("span", { class: "fields" }, shown.slice(0, FIELDS).map(([name, value]) =>
      el("span", { class: "chip", title: `${name}: ${value}` }, `${name} ${String(value).slice(0, 40)}`)));
  }

  thumb(vote) {
    const down = vote < 0;
    const drawing = svg("svg", { viewBox: "0 0 24 24", width: 18, height: 18, "aria-hidden": "true", class: down ? "down" : "" }, svg("path", { d: UP }));
    const words = t(down ? "bad" : "good");
    return el("button", { type: "button", class: "thumb", "aria-label": words, title: words, "data-vote": vote, onclick: () => this.mark(vote) }, drawing);
  }

  mark(vote) {
    if (this.thumbs.length) marks.mark(this.question, this.hit.id, vote);
  }

  showMark() {
    const now = marks.markOf(this.question, this.hit.id);
    for (const thumb of this.thumbs) thumb.setAttribute("aria-pressed", String(Number(thumb.dataset.vote) === now));
  }

  /** `was`: its place on side A; null where it is not there, undefined where nothing is compared. */
  update(hit, place, { heads, tokens, was, fused }) {
    this.rank.textContent = String(place + 1);
    this.score.textContent = number(hit.score, 3);
    this.showMove(place, was);
    this.heads.replaceChildren(...heads.map((each) => this.row(each, fused)));
    if (tokens) this.showTokens(tokens);
  }

  showMove(place, was) {
    const by = was === undefined || was === null ? 0 : was - place;
    const [sign, kind, words] =
      was === undefined ? ["", "", ""]
      : was === null ? [t("fresh"), "fresh", t("fresh_words")]
      : by > 0 ? [`▲${by}`, "up", t("moved_up", { count: by })]
      : by < 0 ? [`▼${-by}`, "down", t("moved_down", { count: -by })]
      : ["=", "stays", t("stays")];
    this.moved.textContent = sign;
    this.moved.className = `moved ${kind}`;
    this.moved.hidden = !sign;
    this.moved.title = words;
    this.moved.setAttribute("aria-label", words);
  }

  row({ head, score, weight, share }, weighted) {
    const told = score === undefined ? "–" : number(score, 3);
    const words = score === undefined ? "" : t("head_share", { head: headName(head), score: told, weight: number(weight, 2) });
    return el("div", { class: `head-row${weight === 0 ? " off" : ""}`, "data-head": head, title: weighted ? words : null },
      el("span", { class: "name" }, headName(head)), bar(share, colour(head)), el("span", { class: "value" }, told));
  }

  showTokens(tokens) {
    const rows = new Map();
    const words = [];
    for (const one of tokens)
      if (one.weight > 0 && ![asked(one), there(one)].some((token) => SIGN.test(token))) rows.set(one.head, [...(rows.get(one.head) ?? []), one]);
    const lines = [...rows].map(([head, all]) => {
      const best = all.sort((a, b) => b.weight - a.weight).slice(0, TOKENS);
      const most = best[0].weight;
      const strong = best.filter((one) => head === "sparse" || one.weight >= MARKED * most);
      words.push(...strong.map(there));
      return el("p", { class: "token-line" }, el("span", { class: `dot ${colour(head)}`, title: headName(head) }),
        best.map((one) => this.chip(one, head, one.weight / most)));
    });
    this.tokens.replaceChildren(...lines);
    this.tokens.setAttribute("aria-label", t("matched"));
    this.fill(words);
  }

  chip(one, head, strength) {
    const [query, document] = [asked(one), there(one)];
    const same = query === document;
    const words = same ? query : t("pair", { query, document });
    const node = el("span", { class: `token ${colour(head)}`, title: `${words}: ${signed(one.weight, 3)}` }, same ? query : `${query} → ${document}`);
    node.style.setProperty("--strength", String(0.15 + 0.85 * strength));
    return node;
  }

  /** The text, with the words that matched in marks. */
  fill(words) {
    const wanted = [...new Set(words.map((word) => word.toLowerCase()))].filter((word) => word.length > 1 || word > "\u2e80");
    if (this.text.hasChildNodes() && wanted.join(" ") === this.words) return;
    this.words = wanted.join(" ");
    this.text.replaceChildren(...marked(this.hit.text, wanted));
  }

  measure() {
    const open = this.wholeButton.getAttribute("aria-expanded") === "true";
    this.wholeButton.hidden = !open && this.text.scrollHeight <= this.text.clientHeight + 2;
  }

  turn() {
    const open = this.wholeButton.getAttribute("aria-expanded") !== "true";
    this.wholeButton.setAttribute("aria-expanded", String(open));
    this.wholeButton.textContent = t(open ? "shorter" : "whole");
    this.text.classList.toggle("open", open);
    this.measure();
  }
}

/** A token as people write it, without the tokenizer's signs for "begins a word" and "goes on". */
const plain = (token) => String(token).replace(/^(##|▁|Ġ)/, "").replace(/<\/w>$/, "") || String(token);

const asked = (one) => plain(one.query_token ?? one.token);
const there = (one) => plain(one.token);

const LETTER = /[\p{L}\p{N}]/u;

/** Pieces of a text, with `words` in marks where they begin a word or go on with one that is marked. */
function marked(text, words) {
  const small = text.toLowerCase();
  if (!words.length || small.length !== text.length) return [text];
  const pieces = [];
  let from = 0;
  let place = 0;
  while (place < text.length) {
    const begins = place === from || !LETTER.test(text[place - 1]) || small[place] > "\u2e80";
    const word = begins ? words.filter((each) => small.startsWith(each, place)).sort((a, b) => b.length - a.length)[0] : undefined;
    if (word === undefined) place += 1;
    else {
      const found = text.slice(place, place + word.length);
      if (pieces.length && place === from) pieces.at(-1).append(found);
      else pieces.push(text.slice(from, place), el("mark", {}, found));
      from = place += word.length;
    }
  }
  return [...pieces, text.slice(from)].filter((piece) => piece !== "");
}
