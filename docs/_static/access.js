/* Names and roles that the theme leaves out, for those who listen to a page. */
document.addEventListener("DOMContentLoaded", () => {
  const all = (selector, change) => document.querySelectorAll(selector).forEach(change);
  all("li > details > summary:has(.toctree-toggle)", (e) =>
    e.setAttribute("aria-label", `Pages of ${e.closest("li").querySelector("a").textContent}`));
  all("details.hide > summary", (e) => e.removeAttribute("aria-label")); // the bar says what is in it
  all("dt > dl", (e) => e.setAttribute("role", "presentation")); // the lines of a long signature
  all(".bd-sidebar-primary", (e) => (e.setAttribute("role", "complementary"), e.setAttribute("aria-label", "Site")));
});
