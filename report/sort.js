"use strict";
// Headings of a sortable table become buttons: ascending, descending, as it was. Rows of later bodies stay in place.
for (const table of document.querySelectorAll("table[data-sortable]")) {
  const body = table.tBodies[0];
  const original = [...body.rows];
  const headings = [...table.tHead.rows[0].cells];
  const next = { none: "ascending", ascending: "descending", descending: "none" };

  const key = (row, column, numeric) => {
    const cell = row.cells[column];
    if (!numeric) return cell.dataset.value ?? cell.textContent.trim();
    return cell.dataset.value ? Number(cell.dataset.value) : NaN;
  };
  const compare = (column, numeric, sign) => (first, second) => {
    const a = key(first, column, numeric);
    const b = key(second, column, numeric);
    if (!numeric) return sign * a.localeCompare(b, "en", { numeric: true });
    if (Number.isNaN(a) || Number.isNaN(b)) return Number.isNaN(a) - Number.isNaN(b); // no value: last either way
    return sign * (a - b);
  };

  headings.forEach((heading, column) => {
    if (!heading.dataset.sort) return;
    const button = document.createElement("button");
    button.type = "button";
    button.append(...heading.childNodes);
    heading.append(button);
    button.addEventListener("click", () => {
      const order = next[heading.getAttribute("aria-sort")];
      headings.filter((other) => other.dataset.sort).forEach((other) => other.setAttribute("aria-sort", "none"));
      heading.setAttribute("aria-sort", order);
      const sign = order === "descending" ? -1 : 1;
      const rows = [...original];
      if (order !== "none") rows.sort(compare(column, heading.dataset.sort === "number", sign));
      body.append(...rows);
    });
  });
}
