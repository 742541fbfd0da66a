"use strict";
// The page reads without this. It adds: values under the pointer, runs to switch off, pictures to
// enlarge, one sound at a time, and a word on files that could not be loaded.

const figures = (value) => Number(value.toPrecision(4)).toLocaleString("en", { maximumFractionDigits: 8 });
const short = (name) => (name.length > 40 ? `${name.slice(0, 39)}…` : name);
const MOST_READ = 12;  // values of runs at a step

function nearest(points, step) {
  let low = 0, high = points.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (points[middle][0] < step) low = middle; else high = middle;
  }
  return step - points[low][0] < points[high][0] - step ? points[low] : points[high];
}

function readOut(chart) {
  const data = JSON.parse(chart.querySelector("script").textContent);
  const drawing = chart.querySelector(".drawing"), plot = chart.querySelector(".plot");
  const [first, last] = data.steps, [low, high] = data.values;
  const height = (v) => data.log ? Math.log(v / low) / Math.log(high / low) : (v - low) / (high - low);
  const line = document.createElement("i"), box = document.createElement("div");
  line.className = "pointer";
  box.className = "readout";
  line.hidden = box.hidden = true;
  drawing.append(line, box);
  const dots = data.series.map((series) => {
    const dot = document.createElement("i");
    dot.className = `dot s${series.place % 6}`;
    dot.hidden = true;
    drawing.append(dot);
    return dot;
  });
  let step = last;
  const hide = () => { line.hidden = box.hidden = true; dots.forEach((dot) => { dot.hidden = true; }); };
  const show = (wanted) => {
    const on = data.series.filter((series) => !data.many || !document.body.classList.contains(`off-${series.place}`));
    if (!on.length) return hide();
    step = nearest(on.reduce((a, b) => (b.points.length > a.points.length ? b : a)).points, wanted)[0];
    box.replaceChildren();
    const top = document.createElement("b");
    top.textContent = `step ${step.toLocaleString("en")}`;
    box.append(top);
    let more = 0;
    data.series.forEach((series, i) => {
      const ends = [series.points[0][0], series.points[series.points.length - 1][0]];
      dots[i].hidden = !on.includes(series) || step < ends[0] || step > ends[1];
      if (dots[i].hidden) return;
      const [x, y] = nearest(series.points, step);
      dots[i].style.left = `${100 * (x - first) / (last - first)}%`;
      dots[i].style.bottom = `${100 * height(y)}%`;
      const row = document.createElement("span");
      row.textContent = data.many ? `${short(series.name)}  ${figures(y)}` : figures(y);
      if (data.many) row.className = `key s${series.place % 6}`;
      if (box.childElementCount <= MOST_READ) box.append(row); else more += 1;
    });
    if (more) box.append(`and ${more} more: hide runs by their names`);
    const share = (step - first) / (last - first);
    line.style.left = `${100 * share}%`;
    line.hidden = box.hidden = false;
    box.style.left = share < 0.5 ? `calc(${100 * share}% + 10px)` : "auto";
    box.style.right = share < 0.5 ? "auto" : `calc(${100 - 100 * share}% + 10px)`;
  };
  drawing.addEventListener("pointermove", (event) => {
    const box = drawing.getBoundingClientRect();
    show(first + (last - first) * Math.min(1, Math.max(0, (event.clientX - box.left) / box.width)));
  });
  drawing.addEventListener("pointerleave", hide);
  plot.tabIndex = 0;
  plot.addEventListener("blur", hide);
  plot.addEventListener("keydown", (event) => {
    const way = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!way) return;
    event.preventDefault();
    show(Math.min(last, Math.max(first, step + way * (last - first) / 50)));
  });
}

function switches(legend) {
  for (const item of legend.querySelectorAll("li")) {
    const button = document.createElement("button");
    button.type = "button";
    button.setAttribute("aria-pressed", "true");
    button.title = "Show or hide this run's curves";
    button.append(...item.childNodes);
    item.append(button);
    button.addEventListener("click", () => {
      const off = button.getAttribute("aria-pressed") === "true";
      button.setAttribute("aria-pressed", String(!off));
      document.body.classList.toggle(`off-${item.dataset.place}`, off);
      const compared = legend.parentElement;
      for (const path of compared.querySelectorAll(`path[data-place="${item.dataset.place}"]`)) {
        path.style.display = off ? "none" : "";
      }
    });
  }
}

function enlarging() {
  const dialog = document.createElement("dialog"), image = document.createElement("img");
  dialog.className = "enlarged";
  dialog.append(image);
  document.body.append(dialog);
  dialog.addEventListener("click", () => dialog.close());
  for (const picture of document.querySelectorAll("img.zoom")) {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "enlarge";
    button.title = "Enlarge";
    picture.replaceWith(button);
    button.append(picture);
    button.addEventListener("click", () => {
      image.src = picture.src;
      image.alt = picture.alt;
      dialog.showModal();
    });
  }
}

function loading() {
  const media = [...document.querySelectorAll("main img, audio, video")];
  const state = (item) => {
    if (item.tagName === "IMG") return item.complete ? (item.naturalWidth > 0 ? 1 : -1) : 0;
    return item.error ? -1 : item.readyState >= 1 && item.duration > 0 ? 1 : 0;
  };
  let told = "";
  const tell = () => {
    const states = media.map(state);
    const count = (wanted) => states.filter((s) => s === wanted).length;
    const now = `${count(1)} of ${media.length} loaded, ${count(-1)} failed`;
    if (now === told) return;
    told = now;
    document.documentElement.dataset.figures = now;
    media.forEach((item, i) => item.classList.toggle("failed", states[i] < 0));
    const place = document.getElementById("loaded");
    place.hidden = count(-1) === 0;
    place.textContent = `${count(-1)} pictures or sounds could not be loaded: they are links to files that are no longer there.`;
  };
  for (const item of media) {
    for (const event of ["load", "error", "loadedmetadata"]) item.addEventListener(event, tell);
  }
  tell();
  window.addEventListener("load", tell);
}

const errors = [];
window.addEventListener("error", (event) => {
  if (event.message) errors.push(event.message);
  document.documentElement.dataset.errors = errors.join("; ");
});
document.addEventListener("securitypolicyviolation", (event) => {
  errors.push(`${event.violatedDirective}: ${event.blockedURI}`);
  document.documentElement.dataset.errors = errors.join("; ");
});
document.documentElement.dataset.errors = "";
document.querySelectorAll("figure.chart").forEach(readOut);
document.querySelectorAll("ul.legend").forEach(switches);
enlarging();
loading();
document.addEventListener("play", (event) => {
  document.querySelectorAll("audio, video").forEach((other) => { if (other !== event.target) other.pause(); });
}, true);
window.addEventListener("beforeprint", () => {
  document.querySelectorAll("main details:not([open])").forEach((one) => {
    if (one.querySelector(".gallery")) { one.open = true; one.dataset.printed = ""; }
  });
});
window.addEventListener("afterprint", () => {
  document.querySelectorAll("details[data-printed]").forEach((one) => { one.open = false; delete one.dataset.printed; });
});
