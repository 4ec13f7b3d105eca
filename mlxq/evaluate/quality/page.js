"use strict";
(() => {
  const models = JSON.parse(document.getElementById("data").textContent);
  const find = (id) => document.getElementById(id);
  if (!find("explorer")) return;
  const PAGE = 50;
  let shown = PAGE;

  // Texts are set as text, never as markup.
  const element = (tag, className, ...children) => {
    const node = document.createElement(tag);
    if (className) node.className = className;
    node.append(...children);
    return node;
  };
  const joined = (text) => text.replace(/\s*\n\s*/g, " ↵ ");
  const visible = (token) => token.replace(/\n/g, "↵").replace(/\t/g, "→").replace(/ /g, "␣");

  const share = (name, p) => {
    const fill = element("div", "fill");
    fill.style.width = `${100 * p}%`;
    return element("div", "share", name, element("div", "track", fill),
      element("span", "number", `${(100 * p).toFixed(p < 0.01 ? 2 : 1)} %`));
  };
  const candidate = (c) => element("td", "", element("span", "token", visible(c.token)),
    share("ref.", c.p_reference), share("model", c.p_model));

  const row = (flip) => {
    const context = element("td", "context", element("span", "around", joined(flip.before).trimStart()),
      element("mark", "", flip.target.trim() ? joined(flip.target) : visible(flip.target)),
      element("span", "around", joined(flip.after).trimEnd()));
    const where = element("span", "where", `sequence ${flip.sequence}, token ${flip.position}`);
    const kl = flip.kl === null ? "infinite" : flip.kl.toPrecision(3);
    return element("tr", "", element("td", "", kl, where), context, candidate(flip.reference), candidate(flip.model));
  };

  const divergence = (flip) => flip.kl === null ? Infinity : flip.kl;
  const place = (flip) => flip.sequence * 1e7 + flip.position;
  const orders = {
    "kl": (a, b) => divergence(b) - divergence(a) || place(a) - place(b),
    "kl-up": (a, b) => divergence(a) - divergence(b) || place(a) - place(b),
    "position": (a, b) => place(a) - place(b),
    "p_reference": (a, b) => b.reference.p_reference - a.reference.p_reference,
    "p_model": (a, b) => b.model.p_model - a.model.p_model,
  };

  const draw = () => {
    const model = models[Number(find("model").value)];
    const query = find("query").value.toLowerCase();
    const least = Number(find("least").value) || 0;
    const contains = (flip) => [flip.before + flip.target + flip.after, flip.reference.token, flip.model.token]
      .some((text) => text.toLowerCase().includes(query));
    const found = model.flips.filter((flip) => divergence(flip) >= least && contains(flip));
    found.sort(orders[find("order").value]);
    find("flips").replaceChildren(...found.slice(0, shown).map(row));
    const all = model.flips.length < model.n_flips
      ? ` (the ${model.flips.length.toLocaleString("en")} with the largest divergence are in this page)` : "";
    find("count").textContent = `${model.n_flips.toLocaleString("en")} tokens changed${all}; `
      + `${found.length.toLocaleString("en")} match, ${Math.min(shown, found.length)} shown`;
    find("more").hidden = found.length <= shown;
  };
  const restart = () => { shown = PAGE; draw(); };

  models.forEach((model, i) => find("model").append(new Option(model.name, String(i))));
  for (const id of ["model", "query", "least", "order"]) find(id).addEventListener("input", restart);
  find("more").addEventListener("click", () => { shown += PAGE; draw(); });
  document.querySelector(".controls").addEventListener("submit", (event) => event.preventDefault());
  draw();
})();
