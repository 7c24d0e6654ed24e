// A VM's console in a terminal. Over a reboot it attaches again, and shows nothing twice.

import { FitAddon } from "/xterm/addon-fit.mjs";
import { Terminal } from "/xterm/xterm.mjs";
import { stream } from "/api.js";

const AGAIN_MS = 300;
const ENDED = 1000;
const NOT_RUNNING = 4409;

const section = document.getElementById("console");
const title = document.getElementById("console-title");
const place = document.getElementById("terminal");

let attached = null;

class Attached {
  constructor(vm) {
    this.vm = vm;
    this.position = 0;
    this.seen = 0;
    this.socket = null;
    this.timer = null;
    this.isClosed = false;
    this.hasShown = false;
    this.terminal = new Terminal({
      scrollback: 5000,
      theme: { background: "#101317" },
      // A guest can print links, which lead wherever it likes.
      linkHandler: { activate: () => {} },
    });
    this.fit = new FitAddon();
    this.terminal.loadAddon(this.fit);
    // All other keys are the guest's, the tabulator too.
    this.terminal.attachCustomKeyEventHandler((event) => {
      if (!event.ctrlKey || event.key !== "F6") return true;
      if (event.type === "keydown") document.getElementById("console-close").focus();
      return false;
    });
    this.terminal.open(place);
    this.fit.fit();
    const encoder = new TextEncoder();
    this.terminal.onData((text) => this.send(encoder.encode(text)));
    // Answers of the terminal to the guest may be bytes that are no text.
    this.terminal.onBinary((text) => this.send(Uint8Array.from(text, (one) => one.charCodeAt(0))));
    this.connect();
    this.terminal.focus();
  }

  connect() {
    this.socket = stream("console", { id: this.vm.id });
    this.socket.onmessage = (message) => this.take(message.data);
    this.socket.onclose = (event) => this.ended(event);
  }

  take(data) {
    if (typeof data === "string") {
      const opened = JSON.parse(data);
      this.seen = this.hasShown ? Math.max(0, this.position - opened.position) : 0;
      this.position = Math.max(this.position, opened.position);
      this.hasShown = true;
      title.textContent = `Console of ${this.vm.name}`;
      return;
    }
    const bytes = new Uint8Array(data);
    const seen = Math.min(this.seen, bytes.length);
    this.seen -= seen;
    this.position += bytes.length - seen;
    this.terminal.write(bytes.subarray(seen));
  }

  ended(event) {
    if (this.isClosed) return;
    if (event.code === ENDED) {
      title.textContent = `Console of ${this.vm.name}: attaching again`;
      this.timer = setTimeout(() => this.connect(), AGAIN_MS);
      return;
    }
    const why = event.code === NOT_RUNNING ? "the VM has ended" : event.reason || "disconnected";
    title.textContent = `Console of ${this.vm.name}: ${why}`;
  }

  send(data) {
    if (this.socket.readyState === WebSocket.OPEN) this.socket.send(data);
  }

  close() {
    this.isClosed = true;
    clearTimeout(this.timer);
    this.socket.close();
    this.terminal.dispose();
  }
}

export function open(vm) {
  close();
  section.hidden = false;
  title.textContent = `Console of ${vm.name}`;
  attached = new Attached(vm);
  section.scrollIntoView({ block: "nearest" });
}

export function close() {
  attached?.close();
  attached = null;
  section.hidden = true;
}

document.getElementById("console-close").addEventListener("click", close);
document.getElementById("console-break").addEventListener("click", () => {
  attached?.send("break");
  attached?.terminal.focus();
});
addEventListener("resize", () => attached?.fit.fit());
