// The control protocol over HTTP: every answer is the daemon's, a refusal is an exception.

export class Refused extends Error {
  constructor(status, answer) {
    super([answer.message || answer.code, ...(answer.lines ?? [])].join("\n"));
    this.status = status;
    this.code = answer.code;
  }
}

async function answer(response) {
  let told;
  try {
    told = await response.json();
  } catch {
    told = { message: `HTTP ${response.status}` };
  }
  if (!response.ok) throw new Refused(response.status, told);
  return told;
}

async function ask(path, options) {
  try {
    return await fetch(path, options);
  } catch {
    throw new Error("vmctl web does not answer: start it again, and open the link that it prints");
  }
}

export async function read(kind, fields = {}) {
  return answer(await ask(`/api/${kind}?${new URLSearchParams(fields)}`));
}

export async function request(kind, fields = {}) {
  return answer(
    await ask(`/api/${kind}`, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(fields),
    }),
  );
}

export function stream(kind, fields = {}) {
  const url = new URL(`/api/${kind}?${new URLSearchParams(fields)}`, location.href);
  url.protocol = "ws:";
  const socket = new WebSocket(url);
  socket.binaryType = "arraybuffer";
  return socket;
}
