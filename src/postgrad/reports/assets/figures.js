// Values under the pointer, for every figure that carries data-hover.
"use strict";
{
  const SVG = "http://www.w3.org/2000/svg";

  const make = (parent, name, attributes) => {
    const element = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    return parent.appendChild(element);
  };

  const nearest = (points, x) =>
    points.reduce((best, point) => (Math.abs(point[0] - x) < Math.abs(best[0] - x) ? point : best));

  const attach = (svg) => {
    const data = JSON.parse(svg.dataset.hover);
    const figure = svg.closest("figure");
    let layer = null, tip = null;

    const clear = () => {
      layer?.remove();
      tip?.remove();
      layer = tip = null;
    };

    const show = (event) => {
      clear();
      const toPicture = svg.getScreenCTM().inverse();
      const x = new DOMPoint(event.clientX, event.clientY).matrixTransform(toPicture).x;
      const found = data.series.map((series) => [series, nearest(series.at, x)]);
      found.sort((a, b) => Math.abs(a[1][0] - x) - Math.abs(b[1][0] - x));
      const at = found[0][1];
      layer = make(svg, "g", {});
      make(layer, "line", { class: "cursor", x1: at[0], x2: at[0], y1: data.top, y2: data.bottom });
      tip = figure.appendChild(document.createElement("div"));
      tip.className = "tooltip";
      const head = tip.appendChild(document.createElement("b"));
      head.textContent = `${data.label} ${at[2]}`;
      for (const series of data.series) {
        const point = nearest(series.at, at[0]);
        if (Math.abs(point[0] - at[0]) > 0.6) continue;
        if (point[1] !== null) {
          const group = make(layer, "g", { class: `s${series.colour}` });
          make(group, "circle", { class: "marker", cx: point[0], cy: point[1], r: 4 });
        }
        const line = tip.appendChild(document.createElement("div"));
        line.className = `key s${series.colour}`;
        line.append(data.series.length > 1 ? series.name : "");
        line.appendChild(document.createElement("span")).textContent = point[3];
      }
      const box = figure.getBoundingClientRect();
      const pointer = event.clientX - box.left;
      const left = pointer > box.width / 2 ? pointer - tip.offsetWidth - 14 : pointer + 14;
      tip.style.left = `${Math.max(0, left)}px`;
      tip.style.top = `${Math.max(0, event.clientY - box.top - tip.offsetHeight - 10)}px`;
    };

    svg.addEventListener("pointermove", show);
    svg.addEventListener("pointerdown", show);
    svg.addEventListener("pointerleave", clear);
  };

  const attachAll = () => document.querySelectorAll("svg[data-hover]").forEach(attach);
  document.addEventListener("figures", attachAll); // new ones were put into the page
  attachAll();
}
