"use strict";

// Values under the pointer, at the same step in every chart.
const tip = document.createElement("div");
tip.id = "tip";
tip.hidden = true;
document.body.append(tip);

const charts = [...document.querySelectorAll("svg.chart")].map((svg) => {
  const data = JSON.parse(svg.dataset.chart);
  const cursor = document.createElementNS(svg.namespaceURI, "line");
  cursor.setAttribute("class", "cursor");
  cursor.setAttribute("visibility", "hidden");
  cursor.setAttribute("y1", data.box[3]);
  cursor.setAttribute("y2", data.box[4]);
  svg.append(cursor);
  return { svg, data, cursor };
});

function nearest(points, step) {
  let best = 0;
  points.forEach(([at], index) => {
    if (Math.abs(at - step) < Math.abs(points[best][0] - step)) best = index;
  });
  return points[best];
}

function moveCursors(step) {
  for (const { data, cursor } of charts) {
    const [low, high] = data.steps;
    const inside = step >= low && step <= high;
    const x = data.box[1] + ((step - low) / (high - low)) * (data.box[2] - data.box[1]);
    cursor.setAttribute("visibility", inside ? "visible" : "hidden");
    if (!inside) continue;
    cursor.setAttribute("x1", x);
    cursor.setAttribute("x2", x);
  }
}

function showTip(data, step, event) {
  const rows = data.series.map((one) => {
    const row = document.createElement("div");
    const dot = document.createElement("i");
    dot.className = "b" + one.color;
    const value = nearest(one.points, step)[1];
    row.append(dot, one.label + "  " + value.toLocaleString("en", { maximumSignificantDigits: 4 }));
    return row;
  });
  tip.replaceChildren("step " + step.toLocaleString("en"), ...rows);
  tip.hidden = false;
  const left = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8);
  tip.style.left = Math.max(left, 8) + "px";
  tip.style.top = Math.max(event.clientY - tip.offsetHeight - 12, 8) + "px";
}

for (const { svg, data } of charts) {
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * data.box[0];
    const share = (x - data.box[1]) / (data.box[2] - data.box[1]);
    const wanted = data.steps[0] + share * (data.steps[1] - data.steps[0]);
    const step = nearest(data.series[0].points, wanted)[0];
    moveCursors(step);
    showTip(data, step, event);
  });
  svg.addEventListener("pointerleave", () => {
    tip.hidden = true;
    moveCursors(NaN);
  });
}

// One step's completions at a time; without this script all of them stand below each other.
const section = document.getElementById("completions");
if (section) {
  const slider = section.querySelector("input");
  const views = [...section.querySelectorAll(".step")];
  const show = () => {
    views.forEach((view, index) => view.classList.toggle("current", index === +slider.value));
    section.querySelector("output").textContent = views[+slider.value].dataset.step;
  };
  section.classList.add("browsing");
  section.querySelector(".browse").hidden = false;
  slider.addEventListener("input", show);
  show();
}
