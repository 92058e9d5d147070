// A formula stays on one line with the bracket before it and the full stop after it: MathJax's boxes would let a line
// break between them.
document.addEventListener("DOMContentLoaded", () => {
  const text = (node) => (node?.nodeType === Node.TEXT_NODE ? node.data : "");
  for (const formula of document.querySelectorAll("article span.math")) {
    const { previousSibling: before, nextSibling: after } = formula;
    const opens = /[(\[“]*$/.exec(text(before))[0];
    const closes = /^[.,;:!?)\]”]*/.exec(text(after))[0];
    if (!opens && !closes) continue;
    const together = document.createElement("span");
    together.style.whiteSpace = "nowrap";
    formula.replaceWith(together);
    together.append(opens, formula, closes);
    if (opens) before.data = before.data.slice(0, -opens.length);
    if (closes) after.data = after.data.slice(closes.length);
  }
});

// Names and flags of up to 22 letters are not broken; see book.css.
document.addEventListener("DOMContentLoaded", () => {
  for (const word of document.querySelectorAll("article code span.pre")) {
    word.classList.toggle("whole", word.textContent.length <= 22);
  }
  // Of "Solution to Exercise 1.1" the link is the exercise, without the space before it.
  for (const link of document.querySelectorAll("div.solution > p.admonition-title > a")) {
    link.before(" ");
    link.firstChild.data = link.firstChild.data.trimStart();
  }
});

// A formula that is longer than its column is marked; see book.css.
document.addEventListener("DOMContentLoaded", () => {
  const formulas = [...document.querySelectorAll("article .math")];
  const room = (f) => (f.matches("div") ? f : f.closest("p, li, dd, td"))?.clientWidth ?? Infinity;
  const mark = () => {
    formulas.forEach((f) => f.classList.remove("long"));
    const long = formulas.filter((f) => (f.matches("div") ? f.scrollWidth : f.offsetWidth) > room(f));
    long.forEach((f) => f.classList.add("long"));
  };
  const begin = () => {
    mark();
    window.addEventListener("resize", mark);
  };
  if (formulas.length) window.addEventListener("load", () => MathJax.startup.promise.then(begin));
});

// Checks and plots are folded. One click opens all code of a page, and paper shows it.
document.addEventListener("DOMContentLoaded", () => {
  const folded = [...document.querySelectorAll("article details.hide")];
  const minutes = document.querySelector("article p.minutes");
  if (folded.length && minutes) {
    const button = document.createElement("button");
    const label = () => (button.textContent = folded.every((d) => d.open) ? "Fold all code" : "Show all code");
    button.className = "open-code";
    button.addEventListener("click", () => {
      const open = !folded.every((d) => d.open);
      folded.forEach((d) => (d.open = open));
      label();
    });
    label();
    minutes.append(button);
  }
  let shut = [];
  window.addEventListener("beforeprint", () => {
    shut = folded.filter((d) => !d.open);
    shut.forEach((d) => (d.open = true));
  });
  window.addEventListener("afterprint", () => shut.forEach((d) => (d.open = false)));
});

// The tables of equations and scores are lists on a phone. The first can be searched by number, status, chapter or word.
document.addEventListener("DOMContentLoaded", () => {
  const page = /(A-equations|C-scorecard)\.html$/.exec(location.pathname)?.[1];
  if (!page) return;
  const table = document.querySelector("article table");
  table.classList.add("equations"); // see book.css
  table.classList.toggle("scores", page === "C-scorecard");
  if (page === "C-scorecard") return;
  const box = document.createElement("input");
  box.type = "search";
  box.className = "filter";
  box.placeholder = "57, erratum, Adam, ...";
  box.setAttribute("aria-label", "Show the equations with this number, status or word");
  box.addEventListener("input", () => {
    const wanted = box.value.trim().toLowerCase();
    for (const row of table.tBodies[0].rows) {
      const fits = /^\(?\d+\)?$/.test(wanted)
        ? row.cells[0].textContent.trim() === `(${wanted.replace(/[()]/g, "")})`
        : row.textContent.toLowerCase().includes(wanted);
      row.hidden = !fits;
    }
  });
  table.before(box);
});

// A search for 57 or (57) shows the equation of that number first.
document.addEventListener("DOMContentLoaded", async () => {
  const results = document.querySelector("#search-results");
  const wanted = new URLSearchParams(location.search).get("q")?.match(/^\s*\(?(\d+)\)?\s*$/)?.[1];
  if (!results || !wanted) return;
  const page = await fetch("A-equations.html").then((answer) => answer.text()).catch(() => "");
  const rows = new DOMParser().parseFromString(page, "text/html").querySelectorAll("article tbody tr");
  const row = [...rows].find((tr) => tr.cells[0].textContent.trim() === `(${wanted})`);
  if (!row) return;
  const found = document.createElement("p");
  found.className = "found-equation";
  const [link, chapter, status, claim] = row.cells;
  const says = `, ${status.textContent}: ${claim.textContent}`;
  found.append("Equation ", link.querySelector("a"), ", chapter ", chapter.querySelector("a"), says);
  results.before(found);
});

// On a phone a long formula scrolls, and its number with it. So the number stands above it, too; see book.css.
document.addEventListener("DOMContentLoaded", () => {
  for (const display of document.querySelectorAll("article div.math")) {
    const drawn = display.querySelector("mjx-assistive-mml mlabeledtr > mtd");
    const number = drawn ? drawn.textContent.replace(/[()]/g, "") : /\\tag\{([^}]*)\}/.exec(display.textContent)?.[1];
    if (number) display.dataset.number = `(${number.trim()})`;
  }
});

// Figures are drawn with 150 dots to the inch. See book.css for where they keep that size; a tap shows the whole.
document.addEventListener("DOMContentLoaded", () => {
  for (const figure of document.querySelectorAll("article div.cell_output img")) {
    const measure = () => {
      figure.style.setProperty("--drawn", `${(figure.naturalWidth / 150) * 96}px`);
      figure.classList.add("drawn");
    };
    figure.addEventListener("click", () => figure.classList.toggle("drawn"));
    figure.complete ? measure() : figure.addEventListener("load", measure);
  }
});

// What is wider than its box says so while there is more to the right; see book.css. A sentence is not: it has no columns.
document.addEventListener("DOMContentLoaded", () => {
  const tell = (text) => text.classList.toggle("sentences", !/\S {2,}\S/.test(text.textContent));
  document.querySelectorAll("article div.cell_output pre, article div.highlight-text pre").forEach(tell);
  for (const docstring of document.querySelectorAll("article div.highlight-text pre:not(.sentences)")) {
    const paragraphs = docstring.textContent.split(/(\n{2,})/).map((paragraph) => {
      const span = document.createElement("span");
      span.textContent = paragraph;
      tell(span);
      return span;
    });
    docstring.replaceChildren(...paragraphs);
  }
  const boxes = "article pre, article .math, article div.cell_output, article div.pst-scrollable-table-container";
  const all = [...document.querySelectorAll(boxes)];
  const look = (box) => {
    const fits = box.matches("span.math:not(.long)") || box.scrollWidth - box.clientWidth - box.scrollLeft <= 2;
    box.classList.toggle("more", !fits);
  };
  const lookAtAll = () => all.forEach(look);
  document.querySelector("article div.cell_output img")?.closest("div.cell_output").classList.add("first-figure");
  all.forEach((box) => box.addEventListener("scroll", () => look(box), { passive: true }));
  window.addEventListener("resize", lookAtAll);
  for (const change of ["toggle", "click", "load"]) {
    document.addEventListener(change, () => requestAnimationFrame(lookAtAll), true); // unfolded, resized, arrived
  }
  window.addEventListener("load", () => {
    lookAtAll();
    window.MathJax?.startup?.promise?.then(() => requestAnimationFrame(lookAtAll));
  });
});

// A pointer that rests on the number of an equation shows it, wherever in the book it stands.
document.addEventListener("DOMContentLoaded", () => {
  if (!matchMedia("(hover: hover)").matches) return;
  const pages = new Map([[location.pathname, Promise.resolve(document)]]);
  const read = (text) => new DOMParser().parseFromString(text, "text/html");
  const page = (path) => {
    if (!pages.has(path)) pages.set(path, fetch(path).then((answer) => answer.text()).then(read));
    return pages.get(path);
  };
  // What a reader sees of this page's displays is MathJax's by now; their source is kept from before.
  const here = new Map([...document.querySelectorAll("div.math[id]")].map((e) => [e.id, e.textContent]));
  for (const link of document.querySelectorAll('article a[href*="#eq-"]')) {
    const { pathname, hash } = new URL(link.href);
    let shown = null;
    link.addEventListener("mouseenter", async () => {
      shown = document.createElement("div");
      const mine = shown;
      const there = pathname === location.pathname ? null : await page(pathname).catch(() => null);
      const source = there ? there.getElementById(hash.slice(1))?.textContent : here.get(hash.slice(1));
      if (!source || shown !== mine || !window.MathJax?.typesetPromise) return;
      mine.className = "shown-equation math";
      mine.textContent = source;
      const { left, bottom } = link.getBoundingClientRect();
      mine.style.top = `${bottom + scrollY + 6}px`;
      mine.style.left = `${Math.max(8, Math.min(left, innerWidth - 650))}px`;
      document.body.append(mine);
      await MathJax.typesetPromise([mine]);
    });
    link.addEventListener("mouseleave", () => {
      shown?.remove();
      shown = null;
    });
  }
});

// A table of levels beside the sidebars is set as small as it needs to be.
document.addEventListener("DOMContentLoaded", () => {
  const fit = () => {
    for (const table of document.querySelectorAll("div.cell.tag_level-table div.cell_output pre")) {
      table.style.fontSize = "";
      const part = table.clientWidth / table.scrollWidth;
      if (part < 1 && innerWidth >= 992) table.style.fontSize = `${parseFloat(getComputedStyle(table).fontSize) * part * 0.97}px`;
    }
  };
  fit();
  window.addEventListener("resize", fit);
});

// What a search shows of a page is its words: a formula is left out.
document.addEventListener("DOMContentLoaded", () => {
  if (typeof Search === "undefined" || !Search.htmlToText) return;
  const words = Search.htmlToText;
  const formula = /<(span|div) class="math[^>]*>[^<]*<\/\1>/g;
  Search.htmlToText = (page, ...rest) => words(page.replace(formula, " ... "), ...rest);
});
