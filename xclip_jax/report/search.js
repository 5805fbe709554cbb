"use strict";
const $ = id => document.getElementById(id);
const make = (tag, parent, text = "", name = "") => {
  const node = document.createElement(tag);
  node.textContent = text;
  node.className = name;
  parent.append(node);
  return node;
};
const say = (text, error = false) => { $("found").textContent = text; $("found").classList.toggle("error", error); };
let asked = 0;
// Show the images of an answer, unless a later question replaced it.
const ask = async (address, title) => {
  const number = ++asked;
  say("Searching ...");
  let matches = [];
  try {
    const response = await fetch(address), answer = await response.json();
    if (number !== asked) return;
    if (answer.error) throw new Error(answer.error);
    matches = answer.matches;
    say(matches.length + " images like " + title + ", best first. Select one to find similar ones.");
  } catch (error) {
    if (number !== asked) return;
    say(error instanceof TypeError ? "The server does not answer." : error.message, true);
  }
  show(matches);
};
const show = matches => {
  $("matches").replaceChildren();
  for (const match of matches) {
    const button = make("button", make("li", $("matches"))), title = match.text || match.name.split("/").pop();
    button.type = "button";
    const image = make("img", button);
    image.src = "thumbnail/" + match.image;
    image.alt = "";
    image.loading = "lazy";
    make("span", button, title).title = match.name;
    make("small", button, "cosine " + match.score.toFixed(2));
    button.addEventListener("click", () => ask("similar/" + match.image, title));
  }
};
$("search").addEventListener("submit", event => {
  event.preventDefault();
  ask("search?text=" + encodeURIComponent($("text").value), $("text").value);
});
