// The page works without this script; it adds sorting, filters, tooltips, copying and the theme switch.
(() => {
  "use strict";
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];

  // Theme: the system's until the reader chooses one. Before the page is drawn, so that nothing flashes.
  const root = document.documentElement;
  const themes = ["system", "light", "dark"];
  const stored = (value) => {
    // Storage may be forbidden for local files; then the choice lasts as long as the page.
    try {
      if (value === undefined) return localStorage.getItem("s2d-deploy-theme");
      localStorage.setItem("s2d-deploy-theme", value);
    } catch { /* nothing to do */ }
    return null;
  };
  const dress = (theme) => {
    if (theme === "system") delete root.dataset.theme;
    else root.dataset.theme = theme;
  };
  const remembered = themes.includes(stored()) ? stored() : "system";
  dress(remembered);

  const themeSwitch = () => {
    const choice = document.getElementById("theme");
    choice.value = remembered;
    choice.addEventListener("change", () => { dress(choice.value); stored(choice.value); });
    choice.parentElement.hidden = false;
  };

  // Sorting. A cell's value is data-v on it or on the visible part of it; cells without one come last.
  const sortValue = (row, index) => {
    const cell = row.cells[index];
    const holder = cell.dataset.v === undefined ? cell.querySelector("[data-v]:not([hidden])") : cell;
    if (!holder) return null;
    const value = holder.dataset.v;
    return value.trim() !== "" && Number.isFinite(Number(value)) ? Number(value) : value;
  };
  const words = new Intl.Collator("en", { numeric: true });
  const compare = (a, b) => (typeof a === "number" && typeof b === "number" ? a - b : words.compare(String(a), String(b)));
  const sortable = (table) => {
    const heads = all("thead th", table);
    heads.forEach((head, index) => {
      const press = document.createElement("button");
      press.type = "button";
      press.append(...head.childNodes);
      if (head.title) { // what the heading means: for the keyboard, too
        press.dataset.tip = head.title;
        press.setAttribute("aria-description", head.title);
        head.removeAttribute("title");
      }
      head.append(press);
      head.setAttribute("aria-sort", "none");
      press.addEventListener("click", () => {
        // Numbers start with the largest, words with the first.
        const first = head.classList.contains("num") ? "descending" : "ascending";
        const second = first === "descending" ? "ascending" : "descending";
        const order = head.getAttribute("aria-sort") === first ? second : first;
        heads.forEach((other) => other.setAttribute("aria-sort", other === head ? order : "none"));
        const sign = order === "ascending" ? 1 : -1;
        const rows = [...table.tBodies[0].rows].map((row) => [sortValue(row, index), row]);
        rows.sort(([a], [b]) => (a === null || b === null ? (a === null) - (b === null) : sign * compare(a, b)));
        table.tBodies[0].append(...rows.map(([, row]) => row));
      });
    });
  };

  // Filters: every field of a form must match a row of the table that the form names.
  const apart = new Set(["SPAN", "SMALL", "TD", "TH"]);
  const visibleText = (node) => {
    if (node.nodeType === Node.TEXT_NODE) return node.data;
    if (node.hidden) return "";
    const text = [...node.childNodes].map(visibleText).join("");
    return apart.has(node.nodeName) ? `${text} ` : text;
  };
  const matches = (row, field, text) => {
    const wanted = field.value;
    if (field.dataset.key === "*") return wanted.toLowerCase().split(/\s+/).every((word) => text().includes(word));
    if (field.dataset.has) return wanted === "" || (row.dataset[field.dataset.has] ?? "").split(" ").includes(wanted);
    return wanted === "" || row.dataset[field.dataset.key] === wanted;
  };
  const filtered = (form) => {
    const table = document.getElementById(form.dataset.for);
    const rows = [...table.tBodies[0].rows];
    const output = form.querySelector("output");
    const fields = all("[data-key], [data-has]", form);
    const shows = form.querySelector("[data-shows]");
    const apply = () => {
      let shown = 0;
      for (const row of rows) {
        let known;
        const text = () => (known ??= [...row.cells].map(visibleText).join(" ").toLowerCase());
        row.hidden = !fields.every((field) => matches(row, field, text));
        shown += row.hidden ? 0 : 1;
        const card = row.dataset.layer && document.getElementById(`layer-${row.dataset.layer}`);
        if (card) card.hidden = row.hidden;
      }
      output.textContent = shown === rows.length ? `${rows.length} rows` : `${shown} of ${rows.length} rows`;
    };
    const choose = () => {
      for (const part of all("[data-result]", table)) part.hidden = part.dataset.result !== shows.value;
      const note = form.parentElement.querySelector(".only-print");
      if (note) note.textContent = `SNR, execution and codes of ${shows.selectedOptions[0].textContent}.`;
    };
    if (shows) {
      shows.addEventListener("input", choose);
      if (shows.value !== "0") choose(); // a browser may have kept the choice over a reload
    }
    form.addEventListener("input", apply);
    form.addEventListener("submit", (event) => event.preventDefault());
    form.hidden = false;
    apply();
  };

  // Links to a card unfold it.
  const unfold = () => {
    const card = /^#layer-\d+$/.test(location.hash) && document.querySelector(location.hash);
    if (!card) return;
    card.hidden = false;
    card.open = true;
    card.scrollIntoView({ block: "start" });
  };

  // Tooltips: each SVG <title> becomes one that shows at once. Arrow keys step through a plot's marks, Escape closes.
  const tooltips = () => {
    const tip = document.getElementById("tip");
    const near = 14; // pixels from a mark at which it still answers: small marks are hard to hit
    let marked = null;
    const hide = () => {
      tip.hidden = true;
      if (marked) marked.classList.remove("active");
      marked = null;
    };
    const show = (mark, x, y) => {
      if (marked !== mark) {
        hide();
        marked = mark;
        mark.classList.add("active");
        tip.textContent = mark.dataset.tip;
        tip.hidden = false;
      }
      const box = tip.getBoundingClientRect();
      tip.style.left = `${Math.max(8, Math.min(x + 14, innerWidth - box.width - 8))}px`;
      tip.style.top = `${y + 18 + box.height > innerHeight ? Math.max(8, y - box.height - 12) : y + 18}px`;
    };
    const middle = (mark) => {
      const box = mark.getBoundingClientRect();
      return [box.left + box.width / 2, box.top + box.height / 2, box];
    };
    const nearest = (plot, x, y) => {
      if (!plot) return null;
      let best = null;
      let least = near;
      for (const mark of all("[data-tip]", plot)) {
        const box = mark.getBoundingClientRect();
        const away = Math.hypot(Math.max(box.left - x, 0, x - box.right), Math.max(box.top - y, 0, y - box.bottom));
        if (away < least) [best, least] = [mark, away];
      }
      return best;
    };
    for (const title of all("svg.plot title")) {
      title.parentElement.dataset.tip = title.textContent;
      title.remove();
    }
    const point = (event) => {
      const target = event.target;
      const mark = target.closest?.("[data-tip]") ?? nearest(target.closest?.("svg.plot"), event.clientX, event.clientY);
      if (mark) show(mark, event.clientX, event.clientY);
      else if (marked) hide();
    };
    document.addEventListener("pointermove", (event) => {
      if (event.target.closest?.("[data-tip], svg.plot") || marked) point(event);
    });
    document.addEventListener("pointerdown", point);
    document.addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });
    document.addEventListener("scroll", () => marked && hide(), { capture: true, passive: true });
    document.addEventListener("focusin", (event) => {
      const held = event.target.closest?.("button[data-tip]");
      if (held?.matches(":focus-visible")) requestAnimationFrame(() => show(held, ...middle(held)));
    });
    document.addEventListener("focusout", hide);
    for (const plot of all("svg.plot")) {
      const found = () => all("[data-tip]", plot);
      if (!plot.querySelector("[data-tip]")) continue;
      plot.tabIndex = 0;
      plot.setAttribute("aria-description", `${found().length} values; the arrow keys read them`);
      let at = -1;
      plot.addEventListener("keydown", (event) => {
        const listed = found();
        const last = listed.length - 1;
        const next = { ArrowRight: at + 1, ArrowDown: at + 1, ArrowLeft: at - 1, ArrowUp: at - 1, Home: 0, End: last }[event.key];
        if (next === undefined) return;
        event.preventDefault();
        at = next < 0 ? last : next > last ? 0 : next;
        listed[at].scrollIntoView({ block: "nearest", inline: "nearest", behavior: "instant" });
        // After the scrolling has been told, which closes tooltips.
        requestAnimationFrame(() => requestAnimationFrame(() => show(listed[at], ...middle(listed[at]))));
      });
    }
  };

  // Copying needs a secure context; where there is none, the text can still be selected.
  const copying = () => {
    if (!navigator.clipboard) return;
    for (const copy of all("[data-copy]")) {
      copy.hidden = false;
      copy.addEventListener("click", async () => {
        try {
          await navigator.clipboard.writeText(copy.parentElement.querySelector("code").textContent);
          copy.textContent = "Copied";
        } catch {
          getSelection().selectAllChildren(copy.parentElement.querySelector("code"));
          copy.textContent = "Selected";
        }
        setTimeout(() => { copy.textContent = "Copy"; }, 1500);
      });
    }
  };

  // The section that is being read, in the navigation.
  const following = () => {
    const links = new Map(all("nav a").map((link) => [link.hash.slice(1), link]));
    const seen = new Set();
    const observer = new IntersectionObserver((entries) => {
      for (const { target, isIntersecting } of entries) seen[isIntersecting ? "add" : "delete"](target.id);
      const first = [...links.keys()].find((id) => seen.has(id));
      for (const [id, link] of links) {
        if (id === first) link.setAttribute("aria-current", "true");
        else link.removeAttribute("aria-current");
      }
    }, { rootMargin: "-60px 0px -55% 0px" });
    for (const id of links.keys()) observer.observe(document.getElementById(id));
  };

  document.addEventListener("DOMContentLoaded", () => {
    themeSwitch();
    all("table[data-sortable]").forEach(sortable);
    all("form[data-for]").forEach(filtered);
    tooltips();
    copying();
    following();
    addEventListener("hashchange", unfold);
    // The same address again raises no hashchange.
    document.addEventListener("click", (event) => event.target.closest?.("[data-opens]") && setTimeout(unfold));
    unfold();
  });

  // On paper nothing can be opened.
  addEventListener("beforeprint", () => all("details").forEach((d) => { d.dataset.was = d.open; d.open = true; }));
  addEventListener("afterprint", () => all("details").forEach((d) => { d.open = d.dataset.was === "true"; }));
})();
