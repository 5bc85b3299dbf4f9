// A checkbox for each switch: the measured cell of that combination, and what each flip would change from there.
{
  const data = JSON.parse(document.getElementById("data").textContent);
  const home = document.getElementById("toggles");
  const made = (name, attributes = {}, ...children) => {
    const element = Object.assign(document.createElement(name), attributes);
    element.append(...children);
    return element;
  };
  const condition = made("select", { id: "condition" }, ...data.conditions.map((c, i) => made("option", { value: i }, c.name)));
  const shown = made("dl", { className: "facts" });
  const name = made("h3", { id: "combination" });
  const result = made("div", { className: "result" }, name, shown);
  result.setAttribute("aria-live", "polite");
  const boxes = data.switches.map((label) => {
    const box = made("input", { type: "checkbox", name: label });
    const flip = made("span", { className: "flip", id: `flip-${label}` });
    box.setAttribute("aria-describedby", flip.id);
    return { label, box, flip };
  });
  const switches = made("fieldset", {}, made("legend", {}, "Switches"));
  switches.append(...boxes.map(({ label, box, flip }) => made("div", { className: "toggle" }, made("label", {}, box, ` ${label}`), flip)));

  const step = (here, label, place) => {
    const i = data.switches.indexOf(label);
    const [worth, off] = here.steps[label]?.[((place >> (i + 1)) << i) | (place & (2 ** i - 1))] ?? [];
    return worth && ((place >> i) & 1 ? [1 / worth, 1 / worth / off, off / worth] : [worth, worth / off, worth * off]);
  };
  const said = ([value, low, high]) => `${value.toFixed(2)}× [${low.toFixed(2)}, ${high.toFixed(2)}]`;
  const show = () => {
    const here = data.conditions[condition.value];
    const cell = boxes.filter(({ box }) => box.checked).map(({ label }) => label).join("+") || "baseline";
    const place = boxes.reduce((sum, { box }, i) => sum + (box.checked ? 2 ** i : 0), 0);
    const model = here.predicted[place];
    const { predicted, unmeasured, idle } = data.words;
    const facts = here.cells[cell] ?? (model ? { [`speed-up, ${predicted}`]: said(model), status: unmeasured } : { status: unmeasured });
    const guess = (worth, label) => {
      if (!worth) return undefined;
      const [, low, high] = worth;
      const shown = (low > 1 || high < 1) && (low < 1 - data.band || high > 1 + data.band);
      const word = here.idle.includes(label) && !shown ? `, ${idle}` : "";
      return { latency: `${said(worth).replace("×", "× as fast")}, ${predicted}${word}` };
    };
    name.textContent = cell;
    shown.replaceChildren(...Object.entries(facts).map(([key, text]) => made("div", {}, made("dt", {}, key), made("dd", {}, text))));
    for (const { label, box, flip } of boxes) {
      const change = here.flips[cell]?.[label] ?? guess(step(here, label, place), label);
      const turned = box.checked ? "turn off" : "turn on";
      flip.className = `flip ${change?.verdict ?? ""}`;
      flip.textContent = `${turned}: ${change ? [change.latency, change.memory].filter(Boolean).join(", ") : unmeasured}`;
    }
  };
  const start = () => {
    const cell = data.conditions[condition.value].start.split("+");
    for (const { label, box } of boxes) box.checked = cell.includes(label);
    show();
  };
  switches.addEventListener("change", show);
  condition.addEventListener("change", start);
  const where = made("p", {}, made("label", { htmlFor: "condition" }, "Condition "), condition);
  home.append(...(data.conditions.length > 1 ? [where] : []), made("div", { className: "try" }, switches, result));
  start();
  home.hidden = false;
  document.getElementById("measured").hidden = true;
}
