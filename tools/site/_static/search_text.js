/* Search results quote the text of a page: leave out the TeX of equations, buttons and line marks. */
const quoted = Search.htmlToText;
Search.htmlToText = (html, anchor) => {
  const page = new DOMParser().parseFromString(html, "text/html");
  page.querySelectorAll(".math, .sources, dt.sig, details, .eqno").forEach((e) => e.remove());
  return quoted(page.documentElement.outerHTML, anchor);
};
