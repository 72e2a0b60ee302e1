// What the page asks of its server. A key, where the server wants one, lives in this tab alone.

import { t } from "./words.js";

let key = "";
try {
  key = sessionStorage.getItem("embedsmith-key") || "";
} catch {
  // no storage: it is asked for again after a reload
}
let askForKey = async () => false;

export class Refused extends Error {}

/** `work` shows the key's form and says whether one was given. */
export function whenKeyIsMissing(work) {
  askForKey = work;
}

export function keepKey(given) {
  key = given.trim();
  try {
    sessionStorage.setItem("embedsmith-key", key);
  } catch {
    // see above
  }
}

export const get = (path) => call(path, { method: "GET" });

export const post = (path, body, signal) =>
  call(path, { method: "POST", body: JSON.stringify(body), headers: { "Content-Type": "application/json" }, signal });

async function call(path, options, again = true) {
  const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  let answer;
  try {
    answer = await fetch(path, { ...options, headers, credentials: "same-origin", redirect: "error" });
  } catch (problem) {
    if (problem.name === "AbortError") throw problem;
    throw new Refused(t("unreachable"));
  }
  if (answer.status === 401 && again && (await askForKey())) return call(path, options, false);
  let body = null;
  try {
    body = await answer.json();
  } catch {
    // said below
  }
  if (!answer.ok || body === null) throw new Refused(reason(body) || t("refused", { status: answer.status }));
  return body;
}

/** The server's words for what is wrong, in whichever of the usual places they stand. */
function reason(body) {
  const said = body?.error?.message ?? body?.detail ?? body?.error ?? body?.message;
  return typeof said === "string" ? said : Array.isArray(said) && said[0]?.msg ? said[0].msg : "";
}
