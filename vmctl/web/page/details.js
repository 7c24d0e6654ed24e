// What is known of one VM, and what is rarely done with it.

import { read, request } from "/api.js";
import { moment, size } from "/rates.js";

const dialog = document.getElementById("details");
const facts = document.getElementById("details-facts");
const said = document.getElementById("details-said");
const cloneName = document.getElementById("clone-name");
const snapshotName = document.getElementById("snapshot-name");

let shown = null;

function fact(name, value) {
  const term = document.createElement("dt");
  const text = document.createElement("dd");
  term.textContent = name;
  text.textContent = value;
  facts.append(term, text);
}

function show(vm) {
  facts.replaceChildren();
  fact("Id", vm.id);
  fact("Owner", vm.gid === null ? `user ${vm.uid}` : `user ${vm.uid}, group ${vm.gid}`);
  fact("vCPUs", vm.cpus);
  fact("Memory", size(vm.memory));
  if (vm.boot) fact("Boot", vm.boot);
  vm.disks.forEach((disk, index) => fact(`Disk ${index}`, disk.path));
  vm.interfaces.forEach((one, index) => {
    fact(`Interface ${index}`, [one.lladdr, one.switch, ...one.guest_addresses].join(" "));
    if (one.problem) fact("Problem", one.problem);
  });
  if (vm.has_tpm) fact("TPM", "its secrets are kept by the VM's name and owner");
  if (vm.clone_of) fact("Clone of", vm.clone_of);
  if (vm.started_at !== null) fact("Running since", moment(vm.started_at));
  if (vm.last_end) {
    const end = vm.last_end;
    fact("Last end", `${moment(end.at)}: ${[end.reason, end.message].filter(Boolean).join(": ")}`);
  }
}

export async function open(vm) {
  shown = vm;
  said.textContent = "";
  facts.replaceChildren();
  document.getElementById("details-name").textContent = vm.name;
  cloneName.value = `${vm.name}-%d`;
  snapshotName.value = "";
  dialog.showModal();
  try {
    const found = await read("status", { id: vm.id, devices: true, interfaces: true });
    if (shown === vm && found.vms.length) show(found.vms[0]);
  } catch (err) {
    said.textContent = err.message;
  }
}

function does(button, action) {
  document.getElementById(button).addEventListener("click", async (event) => {
    const vm = shown;
    // The details may be another VM's before it is done.
    const say = (text) => {
      if (shown === vm) said.textContent = text;
    };
    event.target.disabled = true;
    say("…");
    try {
      say(await action(vm));
    } catch (err) {
      say(err.message);
    }
    event.target.disabled = false;
  });
}

does("clone", async (vm) => {
  const { vms } = await request("clone", { id: vm.id, clone: cloneName.value });
  return vms.map((one) => (one.code ? `${one.name}: ${one.message || one.code}` : one.name)).join(", ");
});
does("snapshot", async (vm) => {
  const name = snapshotName.value;
  await request("snapshot", { id: vm.id, snapshot: name });
  return `saved as ${name}`;
});
does("kill", async (vm) => {
  await request("stop", { id: vm.id, force: true, wait: true });
  return "the VM has ended";
});
for (const [input, button] of [[cloneName, "clone"], [snapshotName, "snapshot"]]) {
  input.addEventListener("keydown", (event) => {
    if (event.key === "Enter") document.getElementById(button).click();
  });
}
document.getElementById("details-close").addEventListener("click", () => dialog.close());
