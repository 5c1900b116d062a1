// A field above the tables of errors that hides the rows without the words typed into it.
document.addEventListener("DOMContentLoaded", () => {
  const field = document.getElementById("filter-errors");
  if (!field) return;
  field.addEventListener("input", () => {
    const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const row of document.querySelectorAll(".errors tbody tr")) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
    }
  });
});
