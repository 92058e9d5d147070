// A formula and the full stop or comma after it stay on one line: MathJax's boxes would let a line break between them.
document.addEventListener("DOMContentLoaded", () => {
  for (const formula of document.querySelectorAll("article span.math")) {
    const next = formula.nextSibling;
    const mark = next?.nodeType === Node.TEXT_NODE ? next.data.match(/^[.,;:!?)\]]+/) : null;
    if (!mark) continue;
    const together = document.createElement("span");
    together.style.whiteSpace = "nowrap";
    formula.replaceWith(together);
    together.append(formula, mark[0]);
    next.data = next.data.slice(mark[0].length);
  }
});
