// The overview (a sheet of videos that grows as one scrolls) and a page for each video, by the address after #.

const job = JSON.parse(block("job"));
const at = Object.fromEntries(job.columns.map((name, i) => [name, i]));
const timeAt = Object.fromEntries(job.timeNames.map((name, i) => [name, i]));
const STEP = 96; // videos that the sheet grows by
const $ = (id) => document.getElementById(id);
const filmed = new Set(job.filmed), traced = new Set(job.timelines);
const blocks = new Map();

function picture(n) {
  const which = Math.floor(n / job.block);
  if (!blocks.has(which)) blocks.set(which, block(`pictures-${which}`).split("\n"));
  const data = blocks.get(which)[n % job.block];
  return data ? `data:image/webp;base64,${data}` : null;
}
function film(n) {
  if (!filmed.has(n)) return null;
  return job.films[n] ?? JSON.parse(block(`film-${n}`));
}
const player = (n, more = {}) => el("video", { src: film(n), controls: true, loop: true, playsinline: true, poster: picture(n), "aria-label": job.rows[n][at.prompt], ...more });

// Overview

function numbers() {
  const count = (status) => job.rows.filter((row) => row[at.status] === status).length;
  const done = job.rows.filter((row) => row[at.status] === "done"), failed = count("failed"), pending = count("pending");
  const seconds = done.map((row) => row[at.seconds]).sort((a, b) => a - b);
  const frames = done.reduce((sum, row) => sum + row[at.shape][0], 0);
  const put = (name, value, bad = false) => $("numbers").append(el("div", {}, el("dt", {}, name), el("dd", bad ? { class: "bad" } : {}, value)));
  put("videos done", String(done.length));
  put("failed", String(failed), failed > 0);
  if (pending) put("pending", String(pending));
  if (seconds.length) {
    put("median time of a video, from its prompt to its file", duration(seconds[seconds.length >> 1]));
    put("slowest", duration(seconds.at(-1)));
    put("frames", frames.toLocaleString("en"));
  }
  $("headline").textContent = `${job.rows.length} video${job.rows.length === 1 ? "" : "s"}, report of ${job.made}`;
  throughput($("throughput"), done.map((row) => row[at.ended] - row[at.seconds]), done.map((row) => row[at.ended]));
}

const PARTS = [["attend", "compute", "attention"], ["other", "other", "other computing in passes"], ["inter", "inter", "transfers between nodes, not hidden"],
  ["intra", "intra", "transfers inside nodes, not hidden"], ["outside", "outside", "outside passes: scheduler, steps' ends"]];

function shares(place, times) {
  if (!times.whole) {
    place.append(el("p", {}, "No trace: the videos were rendered with trace.level=0."));
    return;
  }
  const parts = PARTS.filter(([key]) => times[key] > 0);
  const label = parts.map(([key, , words]) => `${words} ${percent(times[key], times.whole)}`).join(", ");
  place.append(
    el("div", { class: "bar", role: "img", "aria-label": label }, ...parts.map(([key, colour]) => el("span", { style: `flex:${times[key] / times.whole};background:var(--${colour})` }))),
    el("ul", { class: "legend" }, ...parts.map(([key, colour, words]) =>
      el("li", {}, el("i", { style: `background:var(--${colour})` }), `${words}: ${percent(times[key], times.whole)}`))),
    el("p", { class: "note" }, `${duration(times.whole)} of all ranks together while they denoise.${times.detailed && times.detailed < times.steps ? ` Attention and transfers were recorded in ${times.detailed} of ${times.steps} steps; the others are taken to be like these.` : ""} Beside that: encoding ${duration(times.encode)}, decoding ${duration(times.decode)}, writing ${duration(times.write)}.`));
}

const TAXES = [["sync", "Waiting for other ranks in bulk", (t) => t.sync], ["traffic", "Data that leaves the chip between kernels", () => job.estimates.traffic],
  ["launch", "Launch gaps: between steps, and of attention calls", (t) => t.launch + (job.estimates.calls ?? 0)], ["inter", "Transfers between nodes that are not hidden", (t) => t.inter],
  ["intra", "Transfers inside nodes that are not hidden", (t) => t.intra], ["imbalance", "Ranks that compute less than the busiest", (t) => t.imbalance]];

function taxes() {
  const t = job.times;
  $("taxes").hidden = !t.whole;
  const labels = [...document.querySelectorAll("#taxes thead th")].map((th) => th.textContent); // for narrow screens
  for (const [key, words, read] of TAXES) {
    const seconds = read(t), advice = job.advice[key];
    if (!seconds) continue;
    // Also where it is no gain: then it says why nothing is named.
    const gain = advice && advice.after_s !== advice.before_s ? `${duration(advice.before_s)} → ${duration(advice.after_s)}` : "-";
    const override = advice?.override ? el("code", {}, advice.override) : advice ? "none known" : "not priced: rendered by another version";
    const cells = [["number", duration(seconds)], ["number", percent(seconds, t.whole)], ["", override, advice?.why ? el("small", {}, advice.why) : null], ["", gain]];
    $("tax-rows").append(el("tr", { "data-tax": key }, el("th", { scope: "row" }, words), ...cells.map(([kind, ...inside], i) => el("td", { class: kind, "data-label": labels[i + 1] }, ...inside))));
  }
}

function failures() {
  const reasons = new Map();
  job.rows.forEach((row, n) => {
    if (row[at.status] !== "failed") return;
    const reason = row[at.reason] || "no reason was noted";
    if (!reasons.has(reason)) reasons.set(reason, []);
    reasons.get(reason).push(n);
  });
  $("failures").hidden = !reasons.size;
  for (const [reason, rows] of [...reasons].sort((a, b) => b[1].length - a[1].length)) {
    const links = rows.slice(0, 50).map((n) => el("li", {}, el("a", { href: `#/video/${n}` }, job.rows[n][at.id])));
    const more = rows.length > 50 ? el("li", {}, `and ${rows.length - 50} more`) : null;
    $("failure-list").append(el("details", { open: rows.length < 4 }, el("summary", {}, `${rows.length} x ${reason}`), el("ul", {}, ...links, more)));
  }
}

const texts = job.rows.map((row) => `${row[at.prompt]}\n${row[at.id]}\n${row[at.seed]}\n${row[at.reason]}`.toLowerCase());
let found = [], shown = 0;

function search() {
  const words = $("search").value.toLowerCase().split(/\s+/).filter(Boolean), status = $("status").value, key = at[$("sort").value];
  found = job.rows.map((_, n) => n).filter((n) => (!status || job.rows[n][at.status] === status) && words.every((word) => texts[n].includes(word)));
  const back = $("direction").getAttribute("aria-pressed") === "true" ? -1 : 1, seed = key === at.seed;
  const value = (n) => (seed ? BigInt(job.rows[n][key]) : job.rows[n][key] ?? -1);
  const keys = new Map(found.map((n) => [n, value(n)]));
  found.sort((a, b) => { const [x, y] = [keys.get(a), keys.get(b)]; return back * (x < y ? -1 : x > y ? 1 : a - b); });
  $("count").textContent = `${found.length} of ${job.rows.length} videos`;
  $("sheet").replaceChildren();
  shown = 0;
  grow();
}

function card(n) {
  const row = job.rows[n], image = picture(n), frame = el("div", { class: "frame" });
  if (image) frame.append(el("img", { src: image, alt: "", loading: "lazy", decoding: "async" }));
  else frame.append(el("span", { class: row[at.status] === "failed" ? "bad" : "" }, row[at.status]));
  const play = filmed.has(n) ? el("button", { type: "button", class: "play", "aria-label": `Play ${row[at.prompt]}`, onclick: () => {
    frame.replaceChildren(player(n, { autoplay: true }));
    play.remove();
    frame.firstChild.focus();
  } }, "▶") : null;
  const small = row[at.status] === "done" ? `${duration(row[at.seconds])}, seed ${row[at.seed]}` : `${row[at.status]}${row[at.reason] ? `: ${row[at.reason].slice(0, 90)}` : ""}`;
  return el("li", { "data-n": n }, frame, play, el("a", { href: `#/video/${n}` }, row[at.prompt] || row[at.id]), el("small", {}, small));
}

function grow() {
  const next = found.slice(shown, shown + STEP);
  $("sheet").append(...next.map(card));
  shown += next.length;
  $("more").hidden = shown >= found.length;
  $("more").textContent = `Show ${Math.min(STEP, found.length - shown)} more of ${found.length - shown}`;
}

// The page of a video

function facts(row) {
  const pairs = [["id", row[at.id]], ["seed", row[at.seed]], ["status", row[at.status]], ["took", duration(row[at.seconds])]];
  if (row[at.reason]) pairs.push(["reason", row[at.reason]]);
  if (row[at.shape]) pairs.push(["size", `${row[at.shape][0]} frames of ${row[at.shape][2]} x ${row[at.shape][1]}`]);
  if (row[at.ended]) pairs.push(["done at", new Date(row[at.ended] * 1e3).toLocaleString()]);
  for (const [key, value] of Object.entries(row[at.sampling] ?? {})) if (!["seed", "num_frames", "height", "width"].includes(key)) pairs.push([key, String(value)]);
  return el("dl", {}, ...pairs.flatMap(([key, value]) => [el("dt", {}, key), el("dd", {}, value)]));
}

function compared(times, p) {
  const rows = [["a step", times.whole / Math.max(times.ranks * times.steps, 1), p.step_s], ["attention calls of a rank in a step", times.attend / (times.ranks * times.steps), p.attend_s * p.layers * p.passes],
    ["transfers of a rank in a step that are not hidden", (times.inter + times.intra) / (times.ranks * times.steps), p.exposed_s]];
  const cells = rows.map(([name, measured, predicted]) => el("tr", {}, el("th", { scope: "row" }, name), el("td", { class: "number" }, duration(measured)),
    el("td", { class: "number" }, duration(predicted)), el("td", { class: "number" }, predicted ? (measured / predicted).toFixed(2) : "-")));
  return el("div", { class: "wide" }, el("table", {}, el("thead", {}, el("tr", {}, ...["", "measured", "the simulator", "ratio"].map((name, i) => el("th", { scope: "col", class: i ? "number" : "" }, name)))), el("tbody", {}, ...cells)));
}

function sums(timeline) {
  const lanes = ["compute", "inter", "intra", "io"], inner = new Set(["step", "pass"]);
  const total = new Map(timeline.ranks.map((rank) => [rank, Object.fromEntries(lanes.map((lane) => [lane, 0]))]));
  for (let i = 0; i < timeline.start.length; i++)
    if (!inner.has(timeline.data.names[timeline.name[i]])) total.get(timeline.rank[i])[timeline.data.lanes[timeline.lane[i]]] += timeline.end[i] - timeline.start[i];
  const rows = [...total].map(([rank, sum]) => el("tr", {}, el("th", { scope: "row" }, `rank ${rank}`), ...lanes.map((lane) => el("td", { class: "number" }, duration(sum[lane])))));
  return el("details", {}, el("summary", {}, "As a table: seconds in spans, by rank and lane"),
    el("table", {}, el("thead", {}, el("tr", {}, ...["", ...lanes].map((name) => el("th", { scope: "col", class: name ? "number" : "" }, name)))), el("tbody", {}, ...rows)));
}

function timelineOf(n, row) {
  const section = el("section", { "aria-labelledby": "timeline-title" }, el("h2", { id: "timeline-title" }, "Timeline"));
  if (!traced.has(n)) {
    section.append(el("p", {}, row[at.status] === "done" ? "The report holds the traces of the slowest, the quickest and the first videos. This one's is in its HDF5 file: tools/export_trace.py makes a file for ui.perfetto.dev of it." : "There is no trace of a video that is not done."));
    return [section];
  }
  const data = JSON.parse(block(`timeline-${n}`)), prediction = data.prediction === undefined ? null : job.predictions[data.prediction];
  const canvas = el("canvas", { tabindex: 0, role: "application", "aria-roledescription": "timeline", "aria-describedby": "timeline-help", "aria-label": `What each rank did over time; ${data.shown} spans` });
  const said = el("output", { id: "said", "aria-live": "polite" });
  let timeline = null;
  const button = (words, act) => el("button", { type: "button", onclick: () => { act(timeline); said.textContent = `from ${duration(timeline.from)} to ${duration(timeline.to)}`; } }, words);
  const legend = [["compute", "compute"], ["inter", "between nodes"], ["intra", "inside nodes"], ["io", "host, disk"], ["other", "pass"], ["outside", "step"]];
  const few = data.shown < data.total ? ` Of ${data.total} spans ${data.shown} are shown: the steps, and what is inside the first ones.` : "";
  section.append(
    el("div", { class: "tools" }, button("All", (t) => t.fit()), button("A step", (t) => t.step(1)), button("Zoom in", (t) => t.zoom(0.5)), button("Zoom out", (t) => t.zoom(2)), said),
    canvas,
    el("ul", { class: "legend" }, ...legend.map(([colour, words]) => el("li", {}, el("i", { style: `background:var(--${colour})` }), words))),
    el("p", { class: "note", id: "timeline-help" }, `Wheel or + and - zoom, drag or arrows move, Home shows all.${prediction ? " The lowest row of each rank is the simulator's prediction, from where each step begins." : ""}${few}`));
  requestAnimationFrame(() => { timeline = new Timeline(canvas, said, data, prediction); window.timeline = timeline; section.append(sums(timeline)); });
  const times = Object.fromEntries(job.timeNames.map((name) => [name, row[at.times][timeAt[name]]]));
  const where = el("section", { "aria-labelledby": "where-title" }, el("h2", { id: "where-title" }, "Where its time went"));
  shares(where, times);
  if (prediction && times.steps) where.append(compared(times, prediction));
  where.append(el("details", {}, el("summary", {}, "How it was shared out"), el("pre", { class: "wide" }, JSON.stringify({ plan: data.plan, cluster: data.cluster, model: data.model }, null, 1))));
  return [section, where];
}

function videoPage(n) {
  const row = job.rows[n], image = picture(n), frame = el("div", { class: "frame" });
  if (filmed.has(n)) frame.append(player(n));
  else if (image) frame.append(el("img", { src: image, alt: `A frame of: ${row[at.prompt]}` }));
  else frame.append(el("span", { class: "bad" }, row[at.status]));
  const place = found.indexOf(n), link = (words, m) => (m === undefined ? null : el("a", { href: `#/video/${m}`, rel: words.toLowerCase() }, words));
  const heading = el("h2", { tabindex: "-1" }, row[at.prompt] || row[at.id]);
  $("video").replaceChildren(
    el("nav", { "aria-label": "Videos" }, el("a", { href: "#/" }, "All videos"), link("Previous", found[place - 1]), link("Next", place < 0 ? undefined : found[place + 1])),
    el("section", {}, heading, el("div", { class: "stage" }, frame, facts(row))),
    ...timelineOf(n, row));
  return heading;
}

let scrolled = 0;
function route() {
  const match = location.hash.match(/^#\/video\/(\d+)$/), n = match ? Number(match[1]) : null;
  const single = n !== null && n < job.rows.length;
  if (single && !$("overview").hidden) scrolled = window.scrollY;
  $("overview").hidden = single;
  $("video").hidden = !single;
  window.timeline?.resized.disconnect();
  window.timeline = null;
  document.title = `${single ? job.rows[n][at.id] : job.title} - hpcdit report`;
  if (single) { videoPage(n).focus(); window.scrollTo(0, 0); }
  else { $("video").replaceChildren(); if (scrolled) window.scrollTo(0, scrolled); }
}

numbers();
shares($("shares"), job.times);
taxes();
failures();
search();
$("filter").addEventListener("submit", (event) => event.preventDefault());
for (const id of ["search", "status", "sort"]) $(id).addEventListener("input", search);
$("direction").addEventListener("click", () => {
  $("direction").setAttribute("aria-pressed", String($("direction").getAttribute("aria-pressed") !== "true"));
  search();
});
$("more").addEventListener("click", grow);
new IntersectionObserver((seen) => { if (seen.some((each) => each.isIntersecting) && !$("more").hidden) grow(); }, { rootMargin: "400px" }).observe($("more"));
window.addEventListener("hashchange", route);
route();
