// The dashboard: VMs with what they use now, what can be done with them, and events.
//
// Names and messages come from other users and from guests: they are set as text, never as HTML.

import { read, request, stream } from "/api.js";
import * as consoles from "/console.js";
import * as details from "/details.js";
import { rates, share, size, time } from "/rates.js";

const LOOK_MS = 2000;
const EVENTS_MAX = 100;
const RATES = ["disk_read", "disk_written", "net_received", "net_sent"];
const RATE_LABELS = ["Disk read", "Disk written", "Net in", "Net out"];

const summary = document.getElementById("summary");
const problem = document.getElementById("problem");
const table = document.querySelector("#vms tbody");
const list = document.getElementById("events");

const rows = new Map();
let before = new Map();
let lookedAt = 0;
let timer = null;
let isLost = false;

function say(message) {
  problem.textContent = message;
  problem.hidden = !message;
}

// Rows

class Row {
  constructor(vm) {
    this.vm = vm;
    this.pressed = null;
    this.element = document.createElement("tr");
    this.name = this.cell("name");
    this.state = document.createElement("span");
    this.cell("condition").append(this.state);
    this.cpu = this.cell("number cpu", "CPU");
    this.memory = this.cell("number memory", "Memory");
    this.rates = RATE_LABELS.map((label) => this.cell("number", label));
    const actions = document.createElement("div");
    actions.className = "buttons";
    this.cell("actions").append(actions);
    this.buttons = {
      start: this.button(actions, "Start", () => request("start", { id: this.vm.id })),
      unpause: this.button(actions, "Unpause", () => request("unpause", { id: this.vm.id })),
      pause: this.button(actions, "Pause", () => request("pause", { id: this.vm.id })),
      stop: this.button(actions, "Stop", () => request("stop", { id: this.vm.id })),
      console: this.button(actions, "Console", () => consoles.open(this.vm)),
      more: this.button(actions, "More", () => details.open(this.vm)),
    };
  }

  cell(kind, label = "") {
    const cell = document.createElement("td");
    cell.className = kind;
    if (label) cell.dataset.label = label;
    this.element.append(cell);
    return cell;
  }

  button(place, text, action) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = text;
    button.addEventListener("click", async () => {
      this.pressed = document.activeElement === button ? button : null;
      button.disabled = true;
      say("");
      try {
        await action();
      } catch (err) {
        say(`${this.vm.name}: ${err.message}`);
      }
      button.disabled = false;
      this.keepFocus();
      look();
    });
    place.append(button);
    return button;
  }

  show(vm, used) {
    this.vm = vm;
    const runs = vm.pid !== null;
    this.element.dataset.name = vm.name;
    this.name.textContent = vm.name;
    this.state.className = `state ${vm.state}`;
    this.state.textContent = vm.pause_reason ? `${vm.state} (${vm.pause_reason})` : vm.state;
    this.cpu.textContent = used ? share(used.cpu) : "–";
    const held = vm.memory_used === null ? "–" : size(vm.memory_used);
    this.memory.textContent = `${held} of ${size(vm.memory)}`;
    this.rates.forEach((cell, index) => {
      cell.textContent = used ? `${size(used[RATES[index]])}/s` : "–";
    });
    this.buttons.start.hidden = runs || vm.state !== "stopped";
    this.buttons.pause.hidden = vm.state !== "running";
    this.buttons.unpause.hidden = vm.state !== "paused";
    this.buttons.stop.hidden = !runs;
    this.buttons.console.hidden = !runs;
    for (const button of Object.values(this.buttons)) {
      button.setAttribute("aria-label", `${button.textContent} ${vm.name}`);
    }
    this.keepFocus();
  }

  // A button that is hidden or disabled loses the focus, and the keyboard its place.
  keepFocus() {
    const now = document.activeElement;
    if (!this.pressed || (now !== this.pressed && now !== document.body)) {
      this.pressed = null; // the person has gone elsewhere
    } else if (this.pressed.hidden) {
      this.pressed = null;
      this.buttons.more.focus();
    } else if (!this.pressed.disabled) {
      this.pressed.focus();
    }
  }
}

function show(vms, seconds) {
  const shown = new Set();
  let last = null;
  for (const vm of vms) {
    shown.add(vm.id);
    let row = rows.get(vm.id);
    if (!row) {
      row = new Row(vm);
      rows.set(vm.id, row);
    }
    row.show(vm, rates(before.get(vm.id), vm, seconds));
    // Only a row that is out of place is moved: a button that has the focus keeps it.
    const wanted = last ? last.nextSibling : table.firstChild;
    if (wanted !== row.element) table.insertBefore(row.element, wanted);
    last = row.element;
  }
  for (const [id, row] of rows) {
    if (shown.has(id)) continue;
    row.element.remove();
    rows.delete(id);
  }
  before = new Map(vms.map((vm) => [vm.id, vm]));
  const running = vms.filter((vm) => vm.pid !== null).length;
  summary.textContent = `${running} of ${vms.length} VMs running`;
  document.getElementById("empty").hidden = vms.length > 0;
}

let isLooking = false;
let mustLook = false;

async function look() {
  if (isLooking) {
    mustLook = true;
    return;
  }
  isLooking = true;
  clearTimeout(timer);
  try {
    const { vms } = await read("status", { statistics: true });
    const now = performance.now();
    show(vms.toSorted((one, other) => one.id - other.id), (now - lookedAt) / 1000);
    lookedAt = now;
    if (isLost) say("");
    isLost = false;
  } catch (err) {
    summary.textContent = err.status === 401 ? "logged out" : "disconnected";
    say(err.message);
    isLost = true;
  }
  document.body.classList.toggle("lost", isLost);
  isLooking = false;
  if (mustLook) {
    mustLook = false;
    look();
  } else if (!document.hidden) {
    timer = setTimeout(look, LOOK_MS);
  }
}

// Events

function tell(event) {
  const line = document.createElement("li");
  const at = document.createElement("time");
  const kind = document.createElement("span");
  at.textContent = time(event.at);
  kind.textContent = event.kind;
  kind.className = "kind";
  line.append(at, event.name, kind, event.message);
  list.prepend(line);
  while (list.children.length > EVENTS_MAX) list.lastChild.remove();
}

function follow() {
  const socket = stream("events");
  socket.onmessage = (message) => {
    tell(JSON.parse(message.data));
    look();
  };
  socket.onclose = () => setTimeout(follow, LOOK_MS);
}

document.addEventListener("visibilitychange", () => {
  if (!document.hidden) look();
});
look();
follow();
