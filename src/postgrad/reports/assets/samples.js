// The browser of samples of a report.
"use strict";
{
  const root = document.getElementById("browser");
  const steps = JSON.parse(document.getElementById("sample-data").textContent);
  const slider = root.querySelector("input[type=range]");
  const search = root.querySelector("input[type=search]");
  const order = root.querySelector("select");
  const where = root.querySelector("output");
  const [back, on] = root.querySelectorAll("button");
  const list = document.getElementById("samples-list");

  const draw = () => {
    const words = search.value.trim().toLowerCase();
    const step = steps[slider.value];
    const shown = (words ? steps : [step]).flatMap((s) => s.rows.map((row, i) => [s, i, row]))
      .filter(([, , row]) => !words || JSON.stringify([row.texts, row.pairs, row.tokens?.join("")])
        .toLowerCase().includes(words));
    if (order.value) {
      const [name, sign] = [order.value.slice(1), order.value[0] === "+" ? 1 : -1];
      const of = ([, , row]) => row.numbers.find(([key]) => key === name)?.[1];
      const known = (value) => (typeof value === "number" ? value : -sign * Infinity);
      shown.sort((a, b) => sign * (known(of(b)) - known(of(a))) || 0);
    }
    where.textContent = words ? `${shown.length} samples contain this` : `step ${step.step}`;
    slider.disabled = Boolean(words);
    back.disabled = words || Number(slider.value) === 0;
    on.disabled = words || Number(slider.value) === steps.length - 1;
    const short = ([, , row]) => row.pairs.length === 0 && row.texts.every(([, text]) => text.length < 80);
    list.className = shown.every(short) ? "compact" : "";
    list.replaceChildren(...shown.slice(0, 100).map(
      ([s, i, row]) => sampleCard(`step ${s.step}, sample ${i + 1}`, row, s.rows)));
  };

  const names = new Set(steps.flatMap((s) => s.rows.flatMap((row) => row.numbers.map(([n]) => n))));
  for (const name of names) {
    for (const [sign, word] of [["+", "highest"], ["-", "lowest"]]) {
      order.append(new Option(`${word} ${name.replaceAll("_", " ")} first`, sign + name));
    }
  }
  slider.max = steps.length - 1;
  slider.value = steps.length - 1;
  slider.addEventListener("input", draw);
  search.addEventListener("input", draw);
  order.addEventListener("change", draw);
  for (const [button, move] of [[back, -1], [on, 1]]) {
    button.addEventListener("click", () => {
      slider.value = Number(slider.value) + move;
      draw();
    });
  }
  draw();
}
