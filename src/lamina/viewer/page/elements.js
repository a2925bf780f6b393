// Elements are made of text alone: nothing in a name becomes markup.

function element(tag, attributes, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) made.setAttribute(name, value);
  }
  made.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return made;
}

function swatch(colour) {
  const made = element("span", { class: "swatch", "aria-hidden": "true" });
  made.colours = colour;
  made.style.backgroundColor = shade(colour);
  return made;
}

function button(label, action, attributes) {
  return element("button", { type: "button", onclick: action, ...attributes }, label);
}

// One of several choices, as buttons in a group.
function choice(label, options, chosen, choose) {
  const group = element("div", { class: "choice", role: "group", "aria-label": label });
  for (const [key, text] of options) {
    group.append(button(text, () => {
      for (const one of group.children) one.setAttribute("aria-pressed", String(one.dataset.key === key));
      choose(key);
    }, { "aria-pressed": String(key === chosen), "data-key": key }));
  }
  return group;
}

function byId(id) {
  return document.getElementById(id);
}
