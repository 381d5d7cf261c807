// The chat page. What a model writes reaches the document as text nodes alone.
import { chat } from "./events.js";

const $ = (id) => document.getElementById(id);
const messages = []; // the conversation, as the server wants it
let model = null; // its card at /v1/models
let running = null; // the AbortController of what is being answered

// The server ----------------------------------------------------------------------------------------

function show(state, kind) {
  $("state").textContent = state;
  $("dot").className = kind;
}

/** Find out what is served, and look again now and then. */
async function look() {
  try {
    const ready = await fetch("/ready");
    const told = await ready.json();
    if (!ready.ok) {
      show(told.progress ? `${told.status}: ${told.progress}` : told.status, "");
      model = null;
    } else if (!model) await meet();
  } catch {
    show("the server cannot be reached", "down");
    model = null;
  }
  setTimeout(look, model ? 5000 : 1000);
}

async function meet() {
  const key = $("key").value;
  const reply = await fetch("/v1/models", key ? { headers: { Authorization: `Bearer ${key}` } } : {});
  $("key-row").hidden = reply.status !== 401 && !key;
  if (!reply.ok) return show(reply.status === 401 ? "the server wants an API key" : "the server refuses", "down");
  model = (await reply.json()).data[0];
  const vocabulary = model.draft_vocab ? `, V' = ${model.draft_vocab.toLocaleString("en")}` : "";
  show(`${model.id} · ${model.method}${vocabulary} · context ${model.max_model_len}`, "ready");
  $("compare").disabled = !model.compares;
  if (!model.compares) $("compare").checked = false;
}

// The conversation ----------------------------------------------------------------------------------

function element(tag, className, text = "") {
  const made = document.createElement(tag);
  made.className = className;
  made.textContent = text;
  return made;
}

/** A pane for one answer. */
function pane(title) {
  const box = element("section", "answer busy");
  const parts = { box, text: element("div", "text"), figures: element("p", "figures") };
  if (title) box.append(element("h2", "", title));
  box.append(parts.text, parts.figures);
  return parts;
}

function figuresOf(figures, counts) {
  if (!figures) return "";
  const said = [`${figures.completion_tokens} tokens`];
  if (figures.tokens_per_second) said.push(`${figures.tokens_per_second.toFixed(1)} tokens/s`);
  if (figures.accepted_length) said.push(`accepted length ${figures.accepted_length.toFixed(2)}`);
  if (counts.drafted + counts.copied) said.push(`${counts.drafted} drafted, ${counts.copied} copied, ${counts.own} own`);
  said.push(`first after ${figures.first_token_seconds.toFixed(2)} s`);
  return said.join(" · ");
}

/** Stream one answer into a pane; its text and figures. */
async function answer(parts, body, signal) {
  const counts = { own: 0, drafted: 0, copied: 0 };
  let text = "";
  let figures = null;
  try {
    for await (const event of chat(body, $("key").value, signal)) {
      for (const choice of event.choices) {
        const atEnd = $("log").scrollHeight - $("log").scrollTop - $("log").clientHeight < 40;
        for (const [piece, origin] of choice.origins ?? []) {
          counts[origin] += 1;
          if (!piece) continue; // a part of a character, which comes whole with the next token
          const token = element("span", `token ${origin}`, piece);
          token.title = origin;
          parts.text.append(token);
          text += piece;
        }
        if (atEnd) $("log").scrollTop = $("log").scrollHeight;
      }
      figures = event.figures ?? figures;
      parts.figures.textContent = figuresOf(figures, counts);
    }
  } finally {
    parts.box.classList.remove("busy");
  }
  return { text, figures };
}

function bodyOf(said) {
  const seed = $("seed").value;
  return {
    model: model.id,
    messages: said,
    stream: true,
    origins: true,
    temperature: Number($("temperature").value),
    max_tokens: Number($("limit").value),
    seed: seed === "" ? Math.floor(Math.random() * 2 ** 31) : Number(seed),
  };
}

/** Answer what the user says: with drafts, and then, for comparison, without: each has the machine to itself. */
async function ask(said) {
  const compare = $("compare").checked;
  $("empty")?.remove();
  const turn = element("div", "turn");
  const answers = element("div", compare ? "answers two" : "answers");
  turn.append(element("p", "user", said), answers);
  $("log").append(turn);
  const panes = [pane(compare ? "with drafts" : "")];
  if (compare) panes.push(pane("vanilla, after it"));
  answers.append(...panes.map((one) => one.box));
  $("log").scrollTop = $("log").scrollHeight;
  messages.push({ role: "user", content: said });
  running = new AbortController();
  $("send").textContent = "Stop";
  try {
    if (!model) throw new Error("The server cannot be reached, or is not ready.");
    const body = bodyOf([...messages]); // as it stands now: the answer is added to it
    const first = await answer(panes[0], body, running.signal);
    messages.push({ role: "assistant", content: first.text });
    if (compare) {
      panes[1].figures.textContent = "Its first answer waits until it is compiled.";
      const second = await answer(panes[1], { ...body, speculative: false }, running.signal);
      turn.append(element("p", "verdict", verdict(first, second)));
    }
    $("said").textContent = "The answer is whole.";
  } catch (error) {
    const stopped = running.signal.aborted;
    const told = element("p", stopped ? "figures" : "error", stopped ? "Stopped." : error.message);
    if (!stopped) told.setAttribute("role", "alert");
    turn.append(told);
    if (error.status === 401) $("key-row").hidden = false;
    if (messages.at(-1)?.role === "user") messages.pop(); // asked again, it would stand there twice
  } finally {
    for (const one of panes) one.box.classList.remove("busy");
    running = null;
    $("send").textContent = "Send";
  }
}

function verdict(first, second) {
  const same = first.text === second.text ? "The two texts are the same" : "The two texts differ (a near-tie)";
  const [mine, its] = [first.figures?.tokens_per_second, second.figures?.tokens_per_second];
  return mine && its ? `${same}; with drafts ${(mine / its).toFixed(2)} × vanilla's tokens a second.` : `${same}.`;
}

// Keys and buttons ----------------------------------------------------------------------------------

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  if (running) return running.abort();
  const said = $("prompt").value;
  if (!said.trim()) return;
  $("prompt").value = "";
  ask(said);
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    if (!running) $("ask").requestSubmit();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
});
$("clear").addEventListener("click", () => {
  running?.abort();
  messages.length = 0;
  $("log").replaceChildren();
  $("prompt").focus();
});
$("theme").addEventListener("click", () => {
  const dark = getComputedStyle(document.documentElement).colorScheme.includes("dark");
  document.documentElement.dataset.theme = dark ? "light" : "dark";
  localStorage.setItem("theme", document.documentElement.dataset.theme);
});
$("key").addEventListener("change", () => {
  sessionStorage.setItem("key", $("key").value);
  model = null;
  meet().catch(() => {});
});

const theme = localStorage.getItem("theme");
if (theme) document.documentElement.dataset.theme = theme;
$("key").value = sessionStorage.getItem("key") ?? "";
look();
