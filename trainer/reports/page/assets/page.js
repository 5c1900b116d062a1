"use strict";
// Sorts a table by the column whose head is clicked: numbers by value, texts by letters; missing values stay last.
for (const button of document.querySelectorAll("thead button")) {
  button.addEventListener("click", () => {
    const head = button.closest("th");
    const place = head.cellIndex;
    const body = head.closest("table").tBodies[0];
    const number = head.classList.contains("number");
    // Numbers begin with the largest, which is the best of most metrics.
    const first = number ? "descending" : "ascending";
    const second = number ? "ascending" : "descending";
    const order = head.getAttribute("aria-sort") === first ? second : first;
    for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", order);
    const sign = order === "ascending" ? 1 : -1;
    const rows = [...body.rows].map((row) => ({ row, cell: row.cells[place] }));
    const missing = ({ cell }) => (number ? !("key" in cell.dataset) : cell.textContent.trim() === "");
    rows.sort((one, two) => {
      if (missing(one) || missing(two)) return missing(one) - missing(two);
      if (number) return sign * (Number(one.cell.dataset.key) - Number(two.cell.dataset.key));
      return sign * one.cell.textContent.localeCompare(two.cell.textContent, "en", { numeric: true });
    });
    body.append(...rows.map(({ row }) => row));
  });
}
// On paper nothing can be unfolded.
addEventListener("beforeprint", () => {
  for (const file of document.querySelectorAll("details")) file.open = true;
});
