// The state of one node, live: asks /api/state every two seconds and shows what it says.
// Nothing is loaded from elsewhere, nothing is stored, and no text from the server becomes HTML.
"use strict";

const PAGE = 4096, EVERY_MS = 2000, KEEP = 150;
const looks = [];            // {at: seconds, stats}, oldest first
let meaning = [];            // the counter table
let paused = false;

const $ = id => document.getElementById(id);

function make(tag, attributes = {}, ...children) {
  const svg = ["svg", "rect", "polyline"].includes(tag);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

function size(bytes) {
  for (const unit of ["B", "KiB", "MiB", "GiB"]) {
    if (Math.abs(bytes) < 1024) return `${bytes.toFixed(unit === "B" ? 0 : 1)} ${unit}`;
    bytes /= 1024;
  }
  return `${bytes.toFixed(1)} TiB`;
}
const count = number => Math.round(number).toLocaleString("en");
const ratio = (part, whole) => whole ? `${(part / whole).toFixed(2)} : 1` : "-";
const perSecond = (rate, text = count) => rate === null ? "-" : `${text(rate)}/s`;

function duration(seconds) {
  const parts = [];
  for (const [unit, length] of [["d", 86400], ["h", 3600], ["min", 60], ["s", 1]]) {
    const number = Math.floor(seconds / length);
    seconds -= number * length;
    if (number) parts.push(`${number} ${unit}`);
  }
  return parts.slice(0, 2).join(" ") || "0 s";
}

// Between two looks; null when unknown, as after a server with a new memory file.
function rateBetween(name, before, after) {
  const grown = after.stats[name] - before.stats[name], took = after.at - before.at;
  return took > 0 && grown >= 0 ? grown / took : null;
}
const rate = name => looks.length < 2 ? null : rateBetween(name, looks.at(-2), looks.at(-1));

function bar(shares, label) {
  const svg = make("svg", {class: "bar", viewBox: "0 0 100 1", preserveAspectRatio: "none", role: "img", "aria-label": label});
  let x = 0;
  for (const [share, colour, opacity] of shares) {
    const width = Math.max(0, Math.min(100 - x, 100 * share));
    svg.append(make("rect", {x, y: 0, width, height: 1, fill: `var(--${colour})`, "fill-opacity": opacity}));
    x += width;
  }
  return svg;
}

function tier(name, text, shares) {
  const used = shares.reduce((sum, [share]) => sum + share, 0) || 0;
  return make("div", {class: "tier"},
    make("p", {}, make("b", {}, `${name} ${(100 * used).toFixed(0)} %`), make("span", {}, text)),
    bar(shares, `${name} ${(100 * used).toFixed(0)} % full`));
}

function showTiers(stats, config) {
  if (onlyLends(config)) {
    const limit = stats.pool_set_frames || 1;
    $("tiers").replaceChildren(tier("Lent", `${size(stats.pers_pageframes * PAGE)} of ${size(limit * PAGE)}, ${count(stats.foreign_pers_pages)} pages, on ${config.listen}`,
      [[stats.pers_pageframes / limit, "peers", 1]]));
    return;
  }
  const limit = stats.pool_limit_frames || 1, only = stats.pers_pageframes, also = stats.eph_pageframes;
  const rows = [tier("RAM",
    `${size((only + also) * PAGE)} of ${size(limit * PAGE)}, ${count(stats.pers_zpages + stats.eph_zpages)} pages, ${config.allocator}, ${config.codec}`,
    [[only / limit, "ram", 1], [also / limit, "ram", 0.45]])];
  if (config.peers?.length || config.etcd) {
    const room = stats.remote_bytes + stats.remote_room_bytes || 1, named = config.peers?.length ?? 0;
    rows.push(tier("Peers", `${size(stats.remote_bytes)} of ${size(room)}, ${count(stats.pers_pages_remoted)} pages, ${stats.live_peers}${config.etcd ? "" : ` of ${named}`} answer`,
      [[stats.remote_bytes / room, stats.live_peers < named ? "bad" : "peers", 1]]));
  }
  if (stats.disk_limit_bytes) rows.push(tier("Disk",
    `${size(stats.disk_bytes)} of ${size(stats.disk_limit_bytes)}, ${count(stats.disk_pages)} pages${stats.disk_degraded ? ", FAILS" : ""}`,
    [[stats.disk_bytes / stats.disk_limit_bytes, stats.disk_degraded ? "bad" : "disk", 1]]));
  const device = stats.device_pages * PAGE || 1;
  rows.push(tier("Device", `${size(stats.logical_bytes)} of ${size(device)}, ${count(stats.same_filled_pages)} same-filled`,
    [[stats.logical_bytes / device, "device", 1]]));
  $("tiers").replaceChildren(...rows);
}

function facts(id, rows) {
  $(id).replaceChildren(...rows.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value))));
}

function line(name) {
  const values = looks.slice(1).map((look, at) => rateBetween(name, looks[at], look) ?? 0);
  const top = Math.max(1e-9, ...values);
  const points = values.map((value, at) => `${at + KEEP - values.length},${(20 - 19 * value / top).toFixed(2)}`).join(" ");
  return make("svg", {viewBox: `0 0 ${KEEP} 21`, preserveAspectRatio: "none", "aria-hidden": "true"}, make("polyline", {points}));
}

// zcache node: no swap device of its own.
const onlyLends = config => !("size" in config);

const LENT_FLOWS = [["that came", "foreign_puts"], ["read", "foreign_gets"], ["dropped", "foreign_drops"],
  ["refused", "foreign_refused_puts"], ["asked back", "foreign_recalled_pages"]];
function showTraffic(lends) {
  const flows = lends ? LENT_FLOWS : [["in", "succ_stores"], ["out", "loads"], ["dropped", "invalidates"], ["refused", "failed_stores"],
    ["written back", "written_back_pages"], ["from below", "cold_loads"]];
  $("traffic").replaceChildren(...flows.map(([label, name]) => make("div", {class: "flow", id: `flow-${name}`},
    make("span", {}, `pages ${label}`), make("span", {class: "n"}, perSecond(rate(name))), line(name))));
}

function time(seconds) {
  for (const [unit, length] of [["ns", 1e-9], ["us", 1e-6], ["ms", 1e-3]])
    if (seconds < 1000 * length) return `${(seconds / length).toPrecision(3)} ${unit}`;
  return `${seconds.toPrecision(3)} s`;
}

// The time that this share of the values is below: as quantile_s in counters.py says it.
const OPEN_BUCKET = 30;
function quantile({unit, count: all, buckets}, share) {
  const second = unit === "nanoseconds" ? 1e-9 : 1e-6;
  let seen = 0;
  for (const [at, number] of buckets.entries()) {
    const lower = at ? 2 ** (at - 1) : 0, upper = 2 ** at;
    if (number && seen + number >= share * all)
      return second * (at === OPEN_BUCKET ? lower : lower + (upper - lower) * (share * all - seen) / number);
    seen += number;
  }
  return 0;
}

// What came into a histogram since the first look that is kept; all of it when it began anew.
function lately(name, now) {
  const before = looks[0].stats.histograms?.[name];
  if (!before || before.count > now.count) return now;
  const grown = now.buckets.map((number, at) => number - (before.buckets[at] ?? 0));
  return {...now, count: now.count - before.count, buckets: grown};
}

const TIMES = {put: "put", get_ram: "get, RAM", get_same: "get, same-filled", get_disk: "get, disk", get_peer: "get, peer",
  writeback: "batch to disk", remote_put: "batch to peers", remote_get: "peer's answer",
  pool_wait: "wait for room", commit_wait: "wait for memory", slot_wait: "wait for a slot"};
function showTimes(histograms = {}) {
  const rows = Object.entries(histograms).filter(([, h]) => h.count).map(([name, h]) => {
    const recent = lately(name, h), shown = recent.count ? recent : h;
    return make("tr", {id: `time-${name}`}, make("td", {}, TIMES[name] ?? name), make("td", {class: "n"}, time(quantile(shown, 0.5))),
      make("td", {class: "n"}, time(quantile(shown, 0.99))), make("td", {class: "n"}, count(shown.count)));
  });
  $("times").replaceChildren(...rows);
}

function showPeers(peers = [], stats, config) {
  $("cluster").hidden = !peers.length;
  const up = peers.filter(peer => peer.state === "up").length;
  $("cluster-sum").textContent = `${up} of ${peers.length} answer, ${config.replicas} copies of each page; `
    + (stats.remote_short_pages ? `${count(stats.remote_short_pages)} copies are missing and are being renewed.` : "no copy is missing.");
  $("peers").replaceChildren(...peers.map(peer => make("tr", {title: peer.why_down}, make("td", {}, peer.name ? `${peer.name} (${peer.address})` : peer.address),
    make("td", {class: peer.state === "up" ? "good" : "bad"}, peer.state + (peer.state === "up" && peer.health !== "ok" ? `, ${peer.health}` : "")),
    make("td", {class: "n"}, peer.state === "up" ? time(peer.latency_us * 1e-6) : "-"), make("td", {class: "n"}, count(peer.copies)),
    make("td", {class: "n"}, size(peer.room_bytes)), make("td", {class: peer.wrong_copies ? "n bad" : "n"}, count(peer.wrong_copies)))));
}

function showOwners(owners = [], stats, config) {
  $("lent").hidden = !config.listen;
  const moved = LENT_FLOWS.map(([label, name]) => `${count(stats[name])} ${label}`).join(", ");
  $("lent-sum").textContent = `${count(stats.foreign_pers_pages)} pages of ${count(stats.foreign_owners)} owners in ${size(stats.foreign_pers_bytes)}`
    + ` of ${size(config.donate ?? 0)}, on ${config.listen}. Pages: ${moved}.`;
  $("owners").replaceChildren(...owners.map(owner => make("tr", {}, make("td", {}, owner.name), make("td", {class: "n"}, count(owner.pages)),
    make("td", {class: "n"}, size(owner.bytes)), make("td", {class: "n"}, size(owner.offered_bytes)),
    make("td", {class: "n"}, `${duration(owner.heard_seconds)} ago`))));
}

function showReasons(health) {
  $("health").textContent = health.status;
  $("health").className = `badge ${health.status}`;
  $("reasons").replaceChildren(...health.reasons.map(({what, do: advice}) =>
    make("p", {class: `reason ${health.status}`}, make("b", {}, what), make("span", {}, advice))));
}

function showCounters() {
  const stats = looks.at(-1).stats, wanted = $("filter").value.trim().toLowerCase();
  const rows = meaning.filter(c => c.name in stats && (!wanted || `${c.name} ${c.help}`.toLowerCase().includes(wanted)));
  $("counters").replaceChildren(...rows.map(c => make("tr", {title: c.help}, make("td", {}, c.name),
    make("td", {class: "n"}, stats[c.name].toLocaleString("en")),
    make("td", {class: "n"}, c.kind === "counter" && rate(c.name) ? count(rate(c.name)) : ""), make("td", {}, c.unit))));
}

function show({ping, stats, config, health, peers, owners}) {
  const lends = onlyLends(config), who = lends ? `${config.name}, node ${ping.pid}` : `server ${ping.server_pid}`;
  $("who").textContent = `${location.host}, version ${ping.version}, ${who}, up ${duration(ping.uptime_seconds)}`;
  document.body.classList.toggle("lends", lends);
  document.title = `zcache ${health.status}`;
  showReasons(health);
  showTiers(stats, config);
  facts("facts", [["stored", size(stats.logical_bytes)], ["in RAM, all of it", size(stats.ram_bytes)],
    ["pages per RAM", ratio(stats.logical_bytes, stats.ram_bytes)],
    ["compression", ratio((stats.pers_zpages + stats.eph_zpages) * PAGE, stats.pers_zbytes + stats.eph_zbytes)],
    ["pages refused", count(stats.failed_stores)], ["pages lost", count(stats.lost_pages)]]);
  showPeers(peers, stats, config);
  showOwners(owners, stats, config);
  showTraffic(lends);
  showTimes(stats.histograms);
  const waited = rate("pool_wait_us");
  facts("behind", [["reserve ready", size(stats.free_frames * PAGE)], ["writes that waited", count(stats.pool_waits)],
    ["waiting now", waited === null ? "-" : `${(waited / 1e4).toFixed(0)} %`],
    ["writeback from / to", `${stats.high_percent} / ${stats.low_percent} %`],
    ["to the disk", perSecond(rate("disk_written_bytes"), size)], ["of it cleaning", perSecond(rate("disk_cleaned_bytes"), size)],
    ["memory pressure", stats.memory_pressure ? "yes" : "no"], ["draining", stats.draining ? "yes" : "no"], ["server beside the pool", size(stats.server_resident_bytes)]]);
  showCounters();
}

function silent(why) {
  $("silent").hidden = !why;
  $("silent").textContent = why ? `No answer (${why}); what follows is from before.` : "";
}

async function ask(path) {
  const answer = await fetch(path, {signal: AbortSignal.timeout(10000)});
  if (!answer.ok) throw new Error(`${path}: ${answer.status}`);
  return answer.json();
}

async function look() {
  try {
    if (!meaning.length) meaning = await ask("api/counters");
    const state = await ask("api/state");
    looks.push({at: performance.now() / 1000, stats: state.stats});
    if (looks.length > KEEP) looks.shift();
    show(state);
    silent("");
  } catch (error) {
    silent(error.message);
  }
}

async function forever() {
  if (!paused && !document.hidden) await look();
  setTimeout(forever, EVERY_MS);
}

$("pause").addEventListener("click", () => {
  paused = !paused;
  $("pause").textContent = paused ? "go on" : "pause";
});
$("filter").addEventListener("input", () => looks.length && showCounters());
forever();
