"use strict";
// Draws the figures of the page in the colours of its theme, and redraws one when its target is chosen.
(function () {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const config = { responsive: true, displaylogo: false, displayModeBar: false };

  function axis(own, line) {
    return Object.assign({ gridcolor: line, linecolor: line, tickcolor: line }, own);
  }

  function layoutOf(figure, printed) {
    const styles = getComputedStyle(document.documentElement);
    const ink = printed ? "#000000" : styles.getPropertyValue("--ink").trim();
    const line = printed ? "#bbbbbb" : styles.getPropertyValue("--line").trim();
    return Object.assign({
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: ink, size: 12 },
      margin: { l: 50, r: 12, t: 8, b: 48 }, hovermode: "closest", dragmode: false,
      legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom" }
    }, figure.layout, { xaxis: axis(figure.layout.xaxis, line), yaxis: axis(figure.layout.yaxis, line) });
  }

  function draw(name, printed) {
    const figure = figures[name];
    const choice = document.getElementById(name + "-choice");
    // a number among the chosen traces is the place of one that stays
    const chosen = choice ? figure.choices[choice.value] : figure.data;
    const data = chosen.map(function (trace) { return typeof trace === "number" ? figure.data[trace] : trace; });
    return window.Plotly.react(name, data, layoutOf(figure, printed), config);
  }

  function drawAll(printed) {
    return Promise.all(Object.keys(figures).map(function (name) { return draw(name, printed); }));
  }

  // one target for both volcanoes: choosing in one chooses in the other, where it has that target
  document.querySelectorAll("select[data-figure]").forEach(function (choice) {
    choice.addEventListener("change", function () {
      document.querySelectorAll("select[data-figure]").forEach(function (other) {
        const volcanoes = [choice, other].every(function (item) { return item.dataset.figure.indexOf("volcano-") === 0; });
        const has = Array.from(other.options).some(function (option) { return option.value === choice.value; });
        if (other === choice || (volcanoes && has)) {
          other.value = choice.value;
          draw(other.dataset.figure, false);
        }
      });
    });
  });

  dark.addEventListener("change", function () { drawAll(false); });
  window.addEventListener("beforeprint", function () { drawAll(true); });
  window.addEventListener("afterprint", function () { drawAll(false); });
  drawAll(false).then(function () { document.documentElement.dataset.drawn = String(Object.keys(figures).length); });
})();
