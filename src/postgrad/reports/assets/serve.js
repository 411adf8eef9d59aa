// Draws the samples of a page of `postgrad serve`, and asks again while a run goes on.
"use strict";
{
  const live = () => document.getElementById("live");
  const lost = document.getElementById("lost");

  const drawSamples = () => {
    const data = document.getElementById("sample-data");
    if (!data) return;
    const rows = JSON.parse(data.textContent);
    document.getElementById("samples-list").replaceChildren(...rows.map((row) =>
      sampleCard(`step ${row.step}`, row, rows.filter((other) => other.step === row.step))));
  };

  let last = "";

  const take = (text) => {
    if (text === last) return;
    last = text;
    const next = new DOMParser().parseFromString(text, "text/html").getElementById("live");
    const chosen = new Set([...document.querySelectorAll("input[name=run]:checked")].map((box) => box.value));
    live().replaceWith(document.adoptNode(next));
    for (const box of document.querySelectorAll("input[type=checkbox][name=run]"))
      box.checked = chosen.has(box.value);
    drawSamples();
    document.dispatchEvent(new Event("figures"));
  };

  const plan = () => {
    const seconds = Number(live().dataset.every);
    if (seconds > 0) setTimeout(ask, 1000 * seconds);
  };

  const ask = async () => {
    if (!document.hidden) {
      try {
        const answer = await fetch(location.href);
        if (!answer.ok) throw new Error(answer.statusText);
        take(await answer.text());
        lost.hidden = true;
      } catch (error) {
        lost.hidden = false; // and asked again
      }
    }
    plan();
  };

  drawSamples();
  plan();
}
