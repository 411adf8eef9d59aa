// The browser of samples. Every word of a model enters the page as text, never as markup.
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

  const element = (name, className, text) => {
    const made = document.createElement(name);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  };

  const number = (value) => {
    if (typeof value !== "number") return String(value);
    const text = Number.isInteger(value) ? value.toLocaleString("en")
      : Math.abs(value) < 1e-3 || Math.abs(value) >= 1e6 ? value.toExponential(3)
      : String(Number(value.toPrecision(4)));
    return text.replace("-", "−");
  };

  const field = (name, content, className = "") => {
    const made = element("div", `field ${className}`);
    made.append(element("div", "name", name.replaceAll("_", " ")), content);
    return made;
  };

  const picture = (name, source) => {
    const image = element("img");
    image.src = source;
    image.alt = name;
    return image;
  };

  // one scale for all samples of a step, so that their colours compare
  const largestOf = (step) => step.rows.flatMap((row) => row.advantages ?? [])
    .filter((value) => typeof value === "number")
    .reduce((largest, value) => Math.max(largest, Math.abs(value)), 0);

  const tokens = (row, largest) => {
    const made = element("div");
    const words = element("div", "tokens");
    const readout = element("output");
    row.tokens.forEach((token, i) => {
      const value = row.advantages[i];
      const word = element("span", "", token || "▯");
      if (typeof value === "number" && value !== 0) {
        const strength = (8 + 52 * Math.abs(value) / largest).toFixed(0);
        word.style.background = `color-mix(in srgb, var(--${value > 0 ? "plus" : "minus"}) ${strength}%, transparent)`;
      }
      word.title = `advantage ${number(value)}`;
      word.addEventListener("pointerenter", () => {
        readout.textContent = `token ${i + 1} of ${row.tokens.length}: advantage ${number(value)}`;
      });
      words.append(word);
    });
    const scale = element("div", "scale");
    if (largest > 0) {
      scale.append("advantage", element("span", "", number(-largest)), element("i"),
        element("span", "", `+${number(largest)}`), readout);
    } else {
      scale.append("every advantage of this step is 0");
    }
    made.append(words, scale);
    return made;
  };

  const card = (step, index, row) => {
    const made = element("article", "card sample");
    const head = made.appendChild(element("header"));
    head.append(element("span", "which", `step ${step.step}, sample ${index + 1}`));
    for (const [name, value] of row.numbers) {
      const chip = element("span", "chip");
      chip.append(element("span", "", `${name.replaceAll("_", " ")} `), number(value));
      head.append(chip);
    }
    for (const [name, value] of row.texts) {
      if (row.tokens && name === "response") continue;
      made.append(field(name, element("div", "text", value), name));
      if (name === "prompt" && row.tokens) made.append(field("response", tokens(row, largestOf(step))));
    }
    if (row.tokens && !row.texts.some(([name]) => name === "prompt"))
      made.append(field("response", tokens(row, largestOf(step))));
    for (const [stem, before, after] of row.pairs) {
      const pair = made.appendChild(element("div", "pair"));
      pair.append(field(`${stem} before`, element("div", "text", before)),
        field(`${stem} after`, element("div", "text", after)));
    }
    for (const [name, source] of row.images) made.append(field(name, picture(name, source)));
    if (row.remark) made.append(element("p", "quiet", row.remark));
    return made;
  };

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
    list.replaceChildren(...shown.slice(0, 100).map(([s, i, row]) => card(s, i, row)));
  };

  const names = new Set(steps.flatMap((s) => s.rows.flatMap((row) => row.numbers.map(([n]) => n))));
  for (const name of names) {
    for (const [sign, word] of [["+", "highest"], ["-", "lowest"]]) {
      const option = element("option", "", `${word} ${name.replaceAll("_", " ")} first`);
      option.value = sign + name;
      order.append(option);
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
