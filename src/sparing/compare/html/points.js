"use strict";
// Points of charts, cells of maps, coloured tokens: what one of them says is shown when the mouse or the keyboard is there.
const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const tip = document.getElementById("tip");

function showTip(text, box) {
  tip.textContent = text;
  tip.hidden = false;
  const size = tip.getBoundingClientRect();
  const left = Math.min(Math.max(8, box.left + box.width / 2 - size.width / 2), innerWidth - size.width - 8);
  const above = box.top - size.height - 8;
  tip.style.left = `${left}px`;
  tip.style.top = `${above > 4 ? above : box.bottom + 8}px`;
}
const hideTip = () => { tip.hidden = true; };

(() => {
  const showPoint = (event) => {
    const point = event.target.closest && event.target.closest(".p, [data-say]");
    if (!point) return;
    const box = (point.querySelector("use") || point).getClientRects()[0];
    if (box) showTip(point.dataset.say || point.getAttribute("aria-label"), box);
  };
  ["mouseover", "focusin", "click"].forEach((name) => document.addEventListener(name, showPoint));
  ["mouseout", "focusout"].forEach((name) => document.addEventListener(name, hideTip));
  document.addEventListener("scroll", hideTip, { passive: true });
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") hideTip(); });
})();

// Each chart is one stop of the Tab key; arrow keys walk its points, in a map also from row to row.
function points(chart) {
  return all(".m:not([hidden]) .p", chart);
}
function giveOneTabStop(chart) {
  const visible = points(chart);
  all(".p", chart).forEach((point) => point.setAttribute("tabindex", "-1"));
  if (visible.length) visible[0].setAttribute("tabindex", "0");
}
all(".chart").forEach((chart) => chart.addEventListener("keydown", (event) => {
  const list = points(chart);
  const at = list.indexOf(document.activeElement);
  if (at < 0) return;
  const row = Number(chart.dataset.columns || 1);
  const last = list.length - 1;
  const goal = { ArrowRight: at + 1, ArrowLeft: at - 1, ArrowDown: at + row, ArrowUp: at - row, Home: 0, End: last }[event.key];
  if (goal === undefined) return;
  event.preventDefault();
  const next = list[Math.min(Math.max(goal, 0), last)];
  list[at].setAttribute("tabindex", "-1");
  next.setAttribute("tabindex", "0");
  next.focus();
}));
