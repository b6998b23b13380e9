// The page works without this script; it adds sorting, filters, tooltips, copying and the theme switch.
(() => {
  "use strict";
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];

  // Theme: the system's choice until the reader makes one.
  const root = document.documentElement;
  const stored = (value) => {
    // Storage may be forbidden for local files; then the choice lasts as long as the page.
    try {
      if (value === undefined) return localStorage.getItem("s2d-deploy-theme");
      localStorage.setItem("s2d-deploy-theme", value);
    } catch { /* nothing to do */ }
    return null;
  };
  const system = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const button = document.getElementById("theme");
  const label = () => { button.textContent = isDark() ? "☀ Light" : "☾ Dark"; };
  if (["light", "dark"].includes(stored())) root.dataset.theme = stored();
  button.hidden = false;
  label();
  system.addEventListener("change", label);
  button.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    stored(root.dataset.theme);
    label();
  });

  // Sorting. A cell's value is data-v on it or on the visible part of it; cells without one come last.
  const sortValue = (row, index) => {
    const cell = row.cells[index];
    const holder = cell.dataset.v === undefined ? cell.querySelector("[data-v]:not([hidden])") : cell;
    if (!holder) return null;
    const value = holder.dataset.v;
    return value.trim() !== "" && Number.isFinite(Number(value)) ? Number(value) : value;
  };
  const compare = (a, b) =>
    typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true });
  for (const table of all("table[data-sortable]")) {
    const heads = all("thead th", table);
    heads.forEach((head, index) => {
      const press = document.createElement("button");
      press.type = "button";
      press.append(...head.childNodes);
      head.append(press);
      head.setAttribute("aria-sort", "none");
      press.addEventListener("click", () => {
        // Numbers start with the largest, words with the first.
        const first = head.classList.contains("num") ? "descending" : "ascending";
        const second = first === "descending" ? "ascending" : "descending";
        const order = head.getAttribute("aria-sort") === first ? second : first;
        heads.forEach((other) => other.setAttribute("aria-sort", other === head ? order : "none"));
        const sign = order === "ascending" ? 1 : -1;
        const rows = all("tbody tr", table).map((row) => [sortValue(row, index), row]);
        rows.sort(([a], [b]) => (a === null || b === null ? (a === null) - (b === null) : sign * compare(a, b)));
        table.tBodies[0].append(...rows.map(([, row]) => row));
      });
    });
  }

  // Filters: every field of a form must match a row of the table that the form names.
  const visibleText = (node) => {
    if (node.nodeType === Node.TEXT_NODE) return node.data + " ";
    return node.hidden ? "" : [...node.childNodes].map(visibleText).join("");
  };
  for (const form of all("form[data-for]")) {
    const table = document.getElementById(form.dataset.for);
    const rows = all("tbody tr", table);
    const output = form.querySelector("output");
    const apply = () => {
      let shown = 0;
      for (const row of rows) {
        const text = [...row.cells].map(visibleText).join(" ").toLowerCase();
        row.hidden = !all("[data-key]", form).every((field) =>
          field.dataset.key === "*"
            ? field.value.toLowerCase().split(/\s+/).every((word) => text.includes(word))
            : field.value === "" || row.dataset[field.dataset.key] === field.value);
        shown += row.hidden ? 0 : 1;
      }
      output.textContent = shown === rows.length ? `${rows.length} rows` : `${shown} of ${rows.length} rows`;
    };
    const shows = form.querySelector("[data-shows]");
    const choose = () => {
      for (const part of all("[data-result]", table)) part.hidden = part.dataset.result !== shows.value;
      const note = form.parentElement.querySelector(".only-print");
      if (note) note.textContent = `Execution and code differences of ${shows.selectedOptions[0].textContent}.`;
    };
    if (shows) {
      shows.addEventListener("input", choose);
      choose(); // a browser may have kept the choice over a reload
    }
    form.addEventListener("input", apply);
    form.addEventListener("submit", (event) => event.preventDefault());
    form.hidden = false;
    apply();
  }

  // Tooltips: each SVG <title> becomes one that shows at once, and that arrow keys reach as well.
  const tip = document.getElementById("tip");
  let marked = null;
  const hide = () => {
    tip.hidden = true;
    if (marked) marked.classList.remove("active");
    marked = null;
  };
  const show = (mark, x, y) => {
    if (marked !== mark) hide();
    marked = mark;
    mark.classList.add("active");
    tip.textContent = mark.dataset.tip;
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(8, Math.min(x + 14, innerWidth - box.width - 8))}px`;
    tip.style.top = `${y + 18 + box.height > innerHeight ? y - box.height - 12 : y + 18}px`;
  };
  for (const title of all("svg.plot title")) {
    title.parentElement.dataset.tip = title.textContent;
    title.remove();
  }
  document.addEventListener("pointermove", (event) => {
    const mark = event.target.closest?.("[data-tip]");
    if (mark) show(mark, event.clientX, event.clientY);
    else if (marked) hide();
  });
  document.addEventListener("scroll", () => marked && hide(), { capture: true, passive: true });
  for (const plot of all("svg.plot")) {
    const marks = all("[data-tip]", plot);
    if (!marks.length) continue;
    plot.tabIndex = 0;
    let at = -1;
    plot.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (event.key === "Escape") hide();
      if (!step) return;
      event.preventDefault();
      at = at < 0 && step < 0 ? marks.length - 1 : (at + step + marks.length) % marks.length;
      const box = marks[at].getBoundingClientRect();
      show(marks[at], box.left + box.width / 2, box.top + box.height / 2);
    });
    plot.addEventListener("blur", hide);
  }

  // Copying needs a secure context; where there is none, the text can still be selected.
  if (navigator.clipboard) {
    for (const copy of all("[data-copy]")) {
      copy.hidden = false;
      copy.addEventListener("click", async () => {
        try {
          await navigator.clipboard.writeText(copy.parentElement.querySelector("code").textContent);
          copy.textContent = "Copied";
        } catch {
          copy.textContent = "Select the text";
        }
        setTimeout(() => { copy.textContent = "Copy"; }, 1500);
      });
    }
  }

  // On paper nothing can be opened.
  addEventListener("beforeprint", () => all("details").forEach((d) => { d.dataset.was = d.open; d.open = true; }));
  addEventListener("afterprint", () => all("details").forEach((d) => { d.open = d.dataset.was === "true"; }));
})();
