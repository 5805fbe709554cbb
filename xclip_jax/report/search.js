"use strict";
const $ = id => document.getElementById(id);
const make = (tag, parent, text = "", name = "") => {
  const node = document.createElement(tag);
  node.textContent = text;
  node.className = name;
  parent.append(node);
  return node;
};
const say = (id, text, error = false) => { $(id).textContent = text; $(id).classList.toggle("error", error); };
const asked = { searched: 0, named: 0 };
// The answer; null where the question failed, which its status then says; undefined where a later one replaced it.
const ask = async (status, address, options) => {
  const number = ++asked[status];
  say(status, "Searching ...");
  try {
    const response = await fetch(address, options), answer = await response.json();
    if (number !== asked[status]) return undefined;
    if (answer.error) throw new Error(answer.error);
    return answer;
  } catch (error) {
    if (number !== asked[status]) return undefined;
    say(status, error instanceof TypeError ? "The server does not answer." : error.message, true);
    return null;
  }
};
const show = (list, matches) => {
  list.replaceChildren();
  for (const match of matches) {
    const button = make("button", make("li", list)), title = match.text || match.name.split("/").pop();
    button.type = "button";
    const image = make("img", button);
    image.src = "thumbnail/" + match.image;
    image.alt = "";
    image.loading = "lazy";
    make("span", button, title).title = match.name;
    make("small", button, "cosine " + match.score.toFixed(2));
    button.addEventListener("click", () => name(match.image, "thumbnail/" + match.image, title));
  }
};
let shown = ""; // address of the file
let given = null; // the image that is shown, for other names
// `image` is the number of an image of the folder, or a file.
const name = async (image, source, title) => {
  given = [image, source, title];
  $("given").src = source;
  $("given").alt = title;
  $("answer").hidden = false;
  $("answer").scrollIntoView({ block: "nearest" });
  const names = $("names").value.split("\n").map(line => line.trim()).filter(Boolean);
  const sent = image instanceof File, parts = sent ? [names.join("\n"), "\n\n", image] : [names.join("\n")];
  const address = sent ? "names" : "names?image=" + image;
  const answer = await ask("named", address, { method: "POST", body: new Blob(parts) });
  if (answer === undefined) return;
  $("best").replaceChildren();
  show($("like"), answer ? answer.matches : []);
  if (!answer) return;
  // Cosines of one image differ by a few hundredths: bars go from the lowest of the list to the highest, but where all
  // are within 0.02 they are nearly equal in length.
  const scores = answer.names.map(best => best.score), high = Math.max(...scores);
  const range = Math.max(high - Math.min(...scores), 0.02);
  for (const [rank, best] of answer.names.entries()) {
    const item = make("li", $("best"), "", rank ? "" : "right");
    item.style.setProperty("--v", 1 - 0.95 * (high - best.score) / range);
    make("span", item, best.name);
    make("small", item, best.score.toFixed(3));
  }
  say("named", answer.names.length ? title + ": " + answer.names[0].name : "Type labels to choose from.");
};
$("search").addEventListener("submit", async event => {
  event.preventDefault();
  const answer = await ask("searched", "search?text=" + encodeURIComponent($("text").value));
  if (answer === undefined) return;
  show($("matches"), answer ? answer.matches : []);
  if (answer) say("searched", answer.matches.length + " images, best first. Select one to label it.");
});
$("image").addEventListener("change", () => {
  const file = $("image").files[0];
  if (!file) return;
  const large = "The image is too large; choose one of at most " + (LIMIT >> 20) + " MiB.";
  if (file.size > LIMIT) return say("named", large, true);
  URL.revokeObjectURL(shown);
  shown = URL.createObjectURL(file);
  name(file, shown, file.name);
});
$("name").addEventListener("submit", event => {
  event.preventDefault();
  if (given) name(...given); else say("named", "Choose an image first.", true);
});
