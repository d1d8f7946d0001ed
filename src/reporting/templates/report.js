// What the page does: draws the figures in the colours of the theme, filters by task, shows one of two scores, and opens the commands of
// a cell. Everything else is there without it.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("report-data").textContent);
  const root = document.documentElement;
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const narrow = matchMedia("(max-width: 640px)");
  const coarse = matchMedia("(pointer: coarse)");
  const all = (selector, from = document) => [...from.querySelectorAll(selector)];
  const tasks = new Set(); // that are shown, by number; none means all
  const hidden = new Set(); // variants that are switched off in curves

  function theme() {
    const chosen = root.dataset.theme;
    return chosen === "light" || chosen === "dark" ? chosen : dark.matches ? "dark" : "light";
  }

  // ---- colours: tokens such as "@v0", "@ink/0.2" (with opacity), "@on/0.7" (text on the scale), "@scale"
  function color(token, name) {
    if (typeof token !== "string" || token[0] !== "@") return token;
    const [key, share] = token.slice(1).split("/");
    const last = data.scales[name].length - 1;
    if (key === "scale") return data.scales[name].map((step, i) => [i / last, step]);
    if (key === "on") return data.inks[name][Math.round(Number(share) * last)];
    const hex = data.themes[name][key];
    if (share === undefined) return hex;
    const channels = [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
    return `rgba(${channels.join(",")},${share})`;
  }

  function painted(node, name, key = "") {
    if (Array.isArray(node)) return node.map((item) => painted(item, name, key));
    if (node && typeof node === "object") {
      return Object.fromEntries(Object.entries(node).map(([k, v]) => [k, painted(v, name, k)]));
    }
    return /color(scale)?$/.test(key) ? color(node, name) : node;
  }

  // ---- figures
  const shown = (numbers) => !tasks.size || numbers.some((number) => tasks.has(number));

  function kept(value, keep) {
    if (Array.isArray(value) && value.length === keep.length) return value.filter((_, i) => keep[i]);
    if (value && typeof value === "object" && !Array.isArray(value)) {
      return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, kept(v, keep)]));
    }
    return value;
  }

  // Takes away the rows of tasks that are not shown.
  function filterRows(figure, rows) {
    const there = rows.ids.map((_, i) => shown([rows.tasks[i]]));
    const ids = rows.ids.filter((_, i) => there[i]);
    const known = new Set(ids);
    figure.data = figure.data.map((trace) => {
      const keep = trace.y.map((id) => known.has(id));
      const { x, colorscale, ...rest } = trace;
      const found = kept(rest, keep);
      return { ...found, colorscale, x: trace.type === "heatmap" ? x : kept(x, keep) };
    });
    Object.assign(figure.layout.yaxis, {
      categoryorder: "array", categoryarray: ids, range: [ids.length - 0.5, -0.5],
      tickvals: ids, ticktext: rows.labels.filter((_, i) => there[i]),
    });
    figure.layout.height = rows.extra + ids.length * rows.height;
  }

  function built(spec, width) {
    const figure = painted({ data: spec.data, layout: spec.layout }, theme());
    for (const trace of figure.data) {
      if (!trace.meta) continue;
      if (narrow.matches && trace.meta.narrow) trace.text = trace.meta.narrow;
      if (hidden.has(trace.meta.variant)) trace.visible = false;
      delete trace.meta;
    }
    if (narrow.matches && spec.narrow) Object.assign(figure.layout.xaxis, spec.narrow);
    if (spec.rows) filterRows(figure, spec.rows);
    figure.layout.width = Math.min(Math.max(width, spec.minWidth || 0), spec.maxWidth || Infinity);
    if (coarse.matches || narrow.matches) figure.layout.dragmode = false; // a finger scrolls the page
    return figure;
  }

  const plots = all(".plot").map((place) => ({ place, spec: data.figures[place.id], drawn: -1 }));
  let version = 0; // of how figures ought to look
  let awake = false;

  function draw(plot) {
    const { place, spec } = plot;
    const figure = built(spec, place.parentElement.clientWidth);
    const first = plot.drawn < 0;
    plot.drawn = version;
    Plotly.react(place, figure.data, figure.layout, { displayModeBar: false, doubleClick: "reset", showTips: false });
    place.style.minHeight = `${figure.layout.height}px`;
    if (first && spec.cells) place.on("plotly_click", (event) => choose(spec, event.points[0]));
  }

  function choose(spec, point) {
    const cell = point.customdata;
    if (cell !== null && cell !== undefined) open(spec.cells, cell);
  }

  // One figure at a time, what is in view first, so that the page answers meanwhile. What is folded away waits.
  function step() {
    const stale = plots.filter((plot) => plot.drawn !== version && plot.place.offsetParent !== null);
    if (!stale.length) {
      awake = false;
      root.dataset.drawn = "all";
      return;
    }
    const away = (plot) => {
      const { top, bottom } = plot.place.getBoundingClientRect();
      return Math.max(top - innerHeight, -bottom, 0);
    };
    draw(stale.map((plot) => [away(plot), plot]).reduce((a, b) => (b[0] < a[0] ? b : a))[1]);
    setTimeout(step);
  }

  function wake() {
    root.dataset.drawn = "some";
    if (!awake) {
      awake = true;
      setTimeout(step);
    }
  }

  function refresh() {
    version += 1;
    wake();
  }

  // ---- filter, score, theme, variants
  function press(buttons, isPressed) {
    for (const button of buttons) button.setAttribute("aria-pressed", String(isPressed(button)));
  }

  function filter(button) {
    const chosen = button.dataset.task;
    if (chosen === "all") tasks.clear();
    else if (!tasks.delete(Number(chosen))) tasks.add(Number(chosen));
    press(all("[data-task]"), (b) => (b.dataset.task === "all" ? !tasks.size : tasks.has(Number(b.dataset.task))));
    for (const part of all("[data-tasks]")) part.hidden = !shown(part.dataset.tasks.split(" ").map(Number));
    refresh();
  }

  function turn(group, value) {
    const setting = group.dataset.switch;
    root.dataset[setting] = value;
    press(all("button", group), (b) => b.dataset.value === value);
    if (setting === "theme") {
      try { localStorage.setItem("canon-lab-theme", value); } catch (error) { /* not remembered */ }
      refresh();
    } else wake();
  }

  function toggle(name) {
    if (!hidden.delete(name)) hidden.add(name);
    press(all("[data-variant]"), (b) => !hidden.has(b.dataset.variant));
    refresh();
  }

  // ---- the commands of a cell
  const panel = document.getElementById("panel");

  function make(tag, text, className) {
    const node = document.createElement(tag);
    if (text !== undefined) node.textContent = text;
    if (className) node.className = className;
    return node;
  }

  function copyButton(text) {
    const button = make("button", "Copy", "copy");
    button.type = "button";
    button.dataset.copy = text;
    return button;
  }

  function open(sweep, number) {
    const cell = data.cells[sweep][number];
    document.getElementById("panel-where").textContent = cell.where;
    document.getElementById("panel-title").textContent = cell.title;
    document.getElementById("panel-facts").replaceChildren(...cell.facts.map(([term, text]) => {
      const pair = make("div");
      pair.append(make("dt", term), make("dd", text));
      return pair;
    }));
    document.getElementById("panel-runs").replaceChildren(...cell.runs.map((run) => {
      const item = make("li"), head = make("p");
      head.append(make("span", run.name), copyButton(run.command));
      item.append(head, make("code", run.command), make("p", run.folder, "folder"));
      return item;
    }));
    document.getElementById("panel-all").dataset.copy = cell.runs.map((run) => run.command).join("\n");
    if (!panel.open) panel.showModal();
    panel.scrollTop = 0;
  }

  async function copy(button) {
    const label = button.textContent;
    try {
      await navigator.clipboard.writeText(button.dataset.copy);
    } catch (error) { // no permission, or no such thing for files
      const area = make("textarea", button.dataset.copy);
      (panel.open ? panel : document.body).append(area);
      area.select();
      document.execCommand("copy");
      area.remove();
    }
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = label === "Copied" ? "Copy" : label; }, 1500);
  }

  document.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (event.target === panel || button?.classList.contains("close")) return panel.close();
    if (!button) return undefined;
    if (button.dataset.task !== undefined) return filter(button);
    if (button.dataset.value !== undefined) return turn(button.parentElement, button.dataset.value);
    if (button.dataset.variant !== undefined) return toggle(button.dataset.variant);
    if (button.dataset.cell !== undefined) return open(button.dataset.sweep, Number(button.dataset.cell));
    if (button.dataset.copy !== undefined) return copy(button);
    return undefined;
  });
  document.addEventListener("toggle", wake, true); // a fold was opened
  dark.addEventListener("change", refresh);
  narrow.addEventListener("change", refresh);
  let width = 0;
  new ResizeObserver(([entry]) => {
    if (entry.contentRect.width !== width) {
      width = entry.contentRect.width;
      refresh();
    }
  }).observe(document.querySelector("main"));
  press(all('[data-switch="theme"] button'), (b) => b.dataset.value === root.dataset.theme);
  wake();
})();
