// A sample as a card. Every word of a model enters the page as text, never as markup.
"use strict";
// (title, row, all rows of its step) => element
const sampleCard = (() => {
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
  const largestOf = (rows) => rows.flatMap((row) => row.advantages ?? [])
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

  return (title, row, rows) => {
    const made = element("article", "card sample");
    const head = made.appendChild(element("header"));
    head.append(element("span", "which", title));
    for (const [name, value] of row.numbers) {
      const chip = element("span", "chip");
      chip.append(element("span", "", `${name.replaceAll("_", " ")} `), number(value));
      head.append(chip);
    }
    for (const [name, value] of row.texts) {
      if (row.tokens && name === "response") continue;
      made.append(field(name, element("div", "text", value), name));
      if (name === "prompt" && row.tokens) made.append(field("response", tokens(row, largestOf(rows))));
    }
    if (row.tokens && !row.texts.some(([name]) => name === "prompt"))
      made.append(field("response", tokens(row, largestOf(rows))));
    for (const [stem, before, after] of row.pairs) {
      const pair = made.appendChild(element("div", "pair"));
      pair.append(field(`${stem} before`, element("div", "text", before)),
        field(`${stem} after`, element("div", "text", after)));
    }
    for (const [name, source] of row.images) made.append(field(name, picture(name, source)));
    if (row.remark) made.append(element("p", "quiet", row.remark));
    return made;
  };
})();
