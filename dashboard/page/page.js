// The page of the dashboard. It listens to one stream, keeps the newest of everything and draws it. Everything that is
// kept is bounded, and nodes of the document are used again, so a page may stay open for weeks.
"use strict";

(() => {
  // Seconds without news after which the page says that it is stale.
  const STALE = 2;
  // Seconds without a byte after which a connection is given up: the node sends several times a second.
  const DEAD = 6;
  const SAMPLES = 600, CONFLICTS = 200, EVENTS = 200;
  const root = document.documentElement;

  // ---- Theme -----------------------------------------------------------------------------------------------------

  // Storage may be forbidden; then choices last as long as the page.
  const remember = (key, value) => { try { localStorage.setItem(key, value); } catch { /* not kept */ } };
  const recall = (key) => { try { return localStorage.getItem(key); } catch { return null; } };

  const themes = ["system", "light", "dark"];
  let theme = recall("quorate-theme");
  if (!themes.includes(theme)) theme = "system";
  root.dataset.theme = theme;

  // ---- The document ----------------------------------------------------------------------------------------------

  const $ = (id) => document.getElementById(id);
  // text changes what is shown only if it is something else, so that nothing is laid out for nothing.
  const text = (node, value) => { if (node.textContent !== value) node.textContent = value; };
  const attr = (node, name, value) => {
    if (value === null) node.removeAttribute(name);
    else if (node.getAttribute(name) !== value) node.setAttribute(name, value);
  };
  const el = (tag, attributes = {}, ...children) => {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name === "on") for (const [event, f] of Object.entries(value)) node.addEventListener(event, f);
      else node.setAttribute(name, value);
    }
    node.append(...children);
    return node;
  };
  // rows makes a parent have as many children as there are items. Children are made once and filled again and again.
  const rows = (parent, items, make, fill) => {
    while (parent.children.length > items.length) parent.lastElementChild.remove();
    while (parent.children.length < items.length) parent.append(make());
    items.forEach((item, i) => fill(parent.children[i], item, i));
  };

  // ---- Numbers ---------------------------------------------------------------------------------------------------

  const NONE = "–";
  const known = (v) => v !== null && v !== undefined;
  const whole = (v) => known(v) ? Math.round(v).toLocaleString("en") : NONE;
  const rate = (v) => !known(v) ? NONE : v >= 100 ? whole(v) : v >= 10 || v === 0 ? v.toFixed(0) : v.toFixed(1);
  const span = (ms) => {
    if (!known(ms)) return NONE;
    if (ms < 0.1) return "0 ms";
    if (ms < 10) return ms.toFixed(1) + " ms";
    if (ms < 1000) return Math.round(ms) + " ms";
    const s = ms / 1000;
    if (s < 10) return s.toFixed(1) + " s";
    if (s < 120) return Math.round(s) + " s";
    if (s < 7200) return Math.floor(s / 60) + " min";
    if (s < 172800) return Math.floor(s / 3600) + " h " + Math.floor(s % 3600 / 60) + " min";
    return Math.floor(s / 86400) + " d " + Math.floor(s % 86400 / 3600) + " h";
  };
  const seconds = (ms) => ms < 120000 ? Math.floor(ms / 1000) + " s" : span(ms);
  const bytes = (v) => {
    if (!known(v)) return NONE;
    const units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
    let u = 0;
    while (v >= 1000 && u < units.length - 1) { v /= 1024; u++; }
    return (v >= 10 || u === 0 ? v.toFixed(0) : v.toFixed(1)) + " " + units[u];
  };
  const clock = (at) => new Date(at).toLocaleTimeString("en-GB");
  // when has the date too, if that is not today's.
  const when = (at) => {
    const then = new Date(at), now = new Date();
    if (then.toDateString() === now.toDateString()) return clock(at);
    const year = then.getFullYear() === now.getFullYear() ? undefined : "numeric";
    return `${then.toLocaleDateString("en-GB", { day: "numeric", month: "short", year })}, ${clock(at)}`;
  };

  // ---- What is known ---------------------------------------------------------------------------------------------

  const state = {
    role: "nobody",
    build: null,
    at: 0, // of the node's clock, Unix milliseconds
    heard: 0, // of this page's clock
    connected: false,
    refusal: "", // why the node does not serve this page
    verdict: null, cluster: null, nodes: [], links: [], transactions: [], silent: [],
    stages: [], // of a commit, in the order in which they are passed
    samples: [], conflicts: [], events: [],
  };
  const changed = new Set();
  const all = ["verdict", "cluster", "nodes", "links", "transactions", "silent", "samples", "conflicts", "events"];

  // append adds to a list. What has come before is replaced: more has become known of it. What a node that was away tells of
  // belongs between what others have told.
  const append = (list, more, limit) => {
    for (const one of more) {
      if (known(one.id)) one.time = Date.parse(one.at);
      const at = known(one.id) ? list.findLastIndex((old) => old.id === one.id) : -1;
      if (at < 0) list.push(one); else list[at] = one;
    }
    if (known(list[0]?.time)) list.sort((a, b) => a.time - b.time);
    if (list.length > limit) list.splice(0, list.length - limit);
  };

  const take = (update) => {
    if (update.first) {
      if (state.build !== null && state.build !== update.build) location.reload(); // the node has a newer page
      state.build = update.build;
      state.stages = [];
      state.samples = []; state.conflicts = []; state.events = [];
      all.forEach((part) => changed.add(part));
    }
    state.at = update.at;
    state.heard = performance.now();
    state.connected = true;
    state.refusal = "";
    if (update.stages !== undefined) { state.stages = update.stages; changed.add("samples"); }
    for (const part of ["verdict", "cluster", "nodes", "links", "transactions", "silent"]) {
      if (update[part] !== undefined) { state[part] = update[part]; changed.add(part); }
    }
    for (const [part, limit] of [["samples", SAMPLES], ["conflicts", CONFLICTS], ["events", EVENTS]]) {
      if (update[part] !== undefined) { append(state[part], update[part], limit); changed.add(part); }
    }
    announce();
    mood();
    draw();
  };

  // ---- The stream ------------------------------------------------------------------------------------------------

  const sleep = (ms) => new Promise((done) => { waking = done; setTimeout(done, ms); });
  let waking = () => {};

  const listen = async () => {
    let pause = 250;
    for (;;) {
      const before = state.heard;
      try {
        await connect();
      } catch { /* whatever it was, the strip says since when there is no news */ }
      state.connected = false;
      mood();
      pause = state.heard !== before ? 250 : Math.min(pause * 2, 5000);
      await sleep(pause * (0.75 + Math.random() / 2));
    }
  };

  const connect = async () => {
    const asked = await fetch("dashboard/session", { signal: AbortSignal.timeout(DEAD * 1000) });
    if (!asked.ok) return;
    const session = await asked.json();
    state.role = session.role;
    $("leave").hidden = !session.login || state.role === "nobody";
    // What was shown to somebody who was known is not left to somebody who is not.
    document.body.toggleAttribute("data-locked", state.role === "nobody" && session.login === true);
    if (state.role === "nobody") {
      if (session.login) await signIn();
      else text($("verdict-text"), "This node shows its cluster to those who have a certificate for it. Have the browser send yours.");
      return;
    }
    changed.add("nodes"); // what may be done to them
    const ending = new AbortController();
    let silence = setTimeout(() => ending.abort(), DEAD * 1000);
    try {
      const response = await fetch("dashboard/stream", { signal: ending.signal });
      if (!response.ok) {
        state.refusal = (await response.json()).error ?? `HTTP status ${response.status}`;
        return;
      }
      const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
      let rest = "";
      for (;;) {
        const { done, value } = await reader.read();
        if (done) return;
        clearTimeout(silence);
        silence = setTimeout(() => ending.abort(), DEAD * 1000);
        const lines = (rest + value).split("\n");
        rest = lines.pop();
        for (const line of lines) if (line.startsWith("data: ")) take(JSON.parse(line.slice(6)));
      }
    } finally {
      clearTimeout(silence);
      ending.abort();
    }
  };

  const signIn = () => new Promise((done) => {
    const dialog = $("sign-in"), form = dialog.querySelector("form"), yes = form.querySelector("button");
    form.onsubmit = async (event) => {
      event.preventDefault();
      yes.disabled = true;
      try {
        const answer = await fetch("dashboard/login", { method: "POST", body: new URLSearchParams({ token: $("token").value.trim() }) });
        if (answer.ok) {
          text($("sign-in-error"), "");
          $("token").value = "";
          dialog.close();
          done();
        } else text($("sign-in-error"), answer.status === 401 ? "This node does not know that token." : `Not signed in: HTTP status ${answer.status}.`);
      } catch (error) {
        text($("sign-in-error"), `Not signed in: ${error.message}`);
      } finally {
        yes.disabled = false;
      }
    };
    dialog.oncancel = (event) => event.preventDefault(); // there is nothing behind it
    if (!dialog.open) dialog.showModal();
  });

  const signOut = async () => {
    try {
      await fetch("dashboard/logout", { method: "POST" });
    } finally {
      location.reload();
    }
  };

  // ---- How fresh it is, and what is said aloud ---------------------------------------------------------------------

  const silent = () => state.heard ? (performance.now() - state.heard) / 1000 : 0;
  const stale = () => state.heard > 0 && silent() > STALE;
  const words = { healthy: "✓ Healthy", degraded: "! Degraded", "no-quorum": "✕ No quorum", stale: "? Stale" };
  let iconOf = "";

  // mood says how fresh the page is and how the cluster is. It does not wait for a frame: in a hidden tab there is none,
  // and the tab's title is all that is seen of it.
  const mood = () => {
    const strip = $("strip"), c = state.cluster, v = state.verdict;
    if (!c || !v) {
      attr(strip, "data-mood", "off");
      text($("strip-text"), state.refusal ? `This node does not serve the page: ${state.refusal}. It is asked again.` : "Connecting…");
      return;
    }
    const old = stale();
    if (old) document.body.dataset.stale = ""; else delete document.body.dataset.stale;
    let kind = "live", since = "", says = `Live from node ${c.node}, ${clock(state.at)}`;
    if (old) {
      kind = "stale";
      says = `Stale: no news from node ${c.node} for ${Math.floor(silent())} s. This is how it was at ${clock(state.at)}.` +
        (state.connected ? "" : state.refusal ? ` It does not serve the page: ${state.refusal}. It is asked again.` : " Reconnecting…");
    } else if (v.level === "no-quorum" && c.quorum) {
      kind = "bad";
      says = `Node ${c.node} is cut off from the majority: commits wait here.`;
    } else if (v.level === "no-quorum") {
      kind = "bad";
      says = `Node ${c.node} has no quorum: ${{ "read-only": "clients can read here, not write", none: "clients are refused here" }[c.access] ?? "clients cannot commit here"}.`;
      if (known(c.quorumAge)) since = `It last heard from a majority ${seconds(c.quorumAge)} ago.`;
    }
    attr(strip, "data-mood", kind);
    text($("strip-text"), says);
    text($("strip-since"), since);
    const level = old ? "stale" : v.level;
    const title = `${words[level]} · ${c.name} · Quorate`;
    if (document.title !== title) document.title = title;
    if (iconOf !== level) {
      iconOf = level;
      const [colour, path] = {
        healthy: ["#0a8a5c", "M8 17l5 5 11-12"], degraded: ["#b86a00", "M16 7v11M16 23v2"],
        "no-quorum": ["#c4161c", "M9 9l14 14M23 9L9 23"], stale: ["#6b7684", "M16 8v9l5 4"],
      }[level];
      $("icon").href = "data:image/svg+xml," + encodeURIComponent(
        `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32"><circle cx="16" cy="16" r="16" fill="${colour}"/><path d="${path}" fill="none" stroke="#fff" stroke-width="4"/></svg>`);
    }
  };

  const last = { level: null, nodes: new Map(), leader: null, stale: false };
  const announce = () => {
    const says = [];
    const v = state.verdict, c = state.cluster;
    if (v && v.level !== last.level) {
      if (last.level !== null) says.push(`${v.title}. ${v.text}`);
      last.level = v.level;
    }
    if (c && c.leader !== last.leader) {
      if (last.leader !== null && c.leader) says.push(`Node ${c.leader} leads.`);
      last.leader = c.leader;
    }
    for (const n of state.nodes) {
      const is = n.reachable ? n.state : "not reached";
      if (last.nodes.has(n.id) && last.nodes.get(n.id) !== is) says.push(`Node ${n.id} is ${is}.`);
      last.nodes.set(n.id, is);
    }
    for (const id of last.nodes.keys()) if (!state.nodes.some((n) => n.id === id)) last.nodes.delete(id);
    if (says.length) text($("said"), says.join(" "));
  };
  const announceStale = () => {
    if (stale() === last.stale) return;
    last.stale = stale();
    text($("said"), last.stale ? "The page is stale: no news from the node." : "The page is live again.");
  };

  // ---- Parts -----------------------------------------------------------------------------------------------------

  const drawVerdict = () => {
    const v = state.verdict;
    document.body.dataset.level = v.level;
    text($("verdict"), v.title);
    text($("verdict-text"), v.text);
    text($("voters-text"), `${v.reachable} of ${v.voters} voters reached, ${v.majority} needed`);
    rows($("troubles"), v.troubles, () => el("li"), text);
  };

  const drawVoters = () => {
    rows($("voters"), state.nodes.filter((n) => n.voter), () => el("li"), (li, n) => {
      text(li, String(n.id));
      attr(li, "data-here", n.reachable ? "yes" : "no");
      const leads = state.cluster && state.cluster.leader === n.id;
      attr(li, "data-leads", leads ? "" : null);
      const is = `node ${n.id}${leads ? ", the leader" : ""}${n.reachable ? "" : ", not reached"}`;
      attr(li, "title", is);
      attr(li, "aria-label", is);
    });
  };

  const facts = new Map();
  const fact = (name, value) => {
    if (!facts.has(name)) {
      const dd = el("dd");
      $("facts").append(el("div", {}, el("dt", {}, name), dd));
      facts.set(name, dd);
    }
    text(facts.get(name), value);
    attr(facts.get(name), "title", value);
  };
  const drawFacts = () => {
    const c = state.cluster, s = state.samples.at(-1);
    text($("name"), c.name);
    fact("Leader", c.leader ? `node ${c.leader}` : "none");
    fact("Term", whole(c.term));
    fact("Commits per second", rate(s?.commits));
    fact("Log committed up to", whole(c.commitIndex));
    fact("Last transaction", whole(c.csn));
    fact(`Clients of node ${c.node}`, { "read-write": "read and write", "read-only": "read only", none: "refused" }[c.access] ?? c.access);
    text($("footer"), `Node ${c.node} of ${c.name}, Quorate ${c.version}. Transactions, conflicts and events are of all nodes; everything else is as this node knows it. The others have a page of their own.`);
  };

  // Cards. Each knows the places of its values.
  const cards = new Map();
  const labels = { drain: "Drain…", resume: "Resume", transfer: "Make it the leader…", resync: "Resync…", remove: "Remove…" };
  const small = ["Applied", "Log", "Clients", "Oldest tx", "Disk free", "WAL kept", "Slot lag", "Up for", "Heard"];
  const card = (id) => {
    const at = {};
    const place = (name, tag = "dd") => (at[name] = el(tag));
    const title = el("h3", { id: `node-${id}` }, `node ${id}`);
    at.role = el("span", { class: "tag" });
    at.kind = el("span", { class: "tag" });
    at.chip = el("span", { class: "chip" });
    at.line = el("p", { class: "line" });
    const numbers = el("dl", { class: "numbers" });
    for (const [name, key] of [["Lag", "lag"], ["Commits/s", "tps"], ["Aborts/s", "aborts"]]) {
      numbers.append(el("div", {}, el("dt", {}, name), place(key)));
    }
    const list = el("dl", { class: "small" });
    for (const name of small) list.append(el("div", {}, el("dt", {}, name), place(name)));
    list.append(el("div", { class: "wide" }, el("dt", {}, "Runs"), place("versions")));
    at.menuButtons = el("div", { role: "group", "aria-label": `Actions for node ${id}` });
    at.menu = el("details", { class: "menu" }, el("summary", {}, "Actions", el("span", { class: "hidden" }, ` for node ${id}`)), at.menuButtons);
    at.link = el("a", {}, "Its own page");
    at.small = list;
    at.root = el("article", { class: "card", "aria-labelledby": `node-${id}` },
      el("header", {}, title, at.role, at.kind, at.chip), at.line, numbers, list,
      el("div", { class: "foot" }, at.link, at.menu));
    return at;
  };
  const drawNodes = () => {
    for (const id of [...cards.keys()]) {
      if (!state.nodes.some((n) => n.id === id)) { cards.get(id).root.remove(); cards.delete(id); }
    }
    state.nodes.forEach((n, i) => {
      if (!cards.has(n.id)) cards.set(n.id, card(n.id));
      const at = cards.get(n.id);
      if ($("cards").children[i] !== at.root) $("cards").insertBefore(at.root, $("cards").children[i] ?? null);
      const self = n.id === state.cluster?.node;
      const good = n.reachable && n.state === "active" && (n.writes || n.witness);
      attr(at.root, "data-mood", good ? "ok" : !n.reachable || n.state === "failed" ? "bad" : "warn");
      text(at.chip, !n.reachable ? "not reached" : n.state === "active" && !good ? (self && state.cluster.access === "read-only" ? "read only" : self ? "no clients" : "no writes") : n.state);
      const leads = n.reachable && n.role === "leader";
      text(at.role, leads ? "★ leader" : !n.role ? "role unknown" : n.reachable ? n.role : `was ${n.role}`);
      at.role.classList.toggle("leads", leads);
      const kind = [self ? "this node" : "", n.witness ? "witness" : "", n.voter ? "" : "no vote"].filter(Boolean).join(", ");
      text(at.kind, kind);
      at.kind.hidden = kind === "";
      const line = good || !n.reason ? (n.gateway ? `Clients connect to ${n.gateway}` : "") : n.reason;
      text(at.line, line);
      attr(at.line, "title", line);
      // What a node that is gone said last is not how it is.
      const v = (value) => n.reachable ? value : null;
      text(at.lag, whole(v(n.lag)));
      text(at.tps, rate(v(n.tps)));
      text(at.aborts, rate(v(n.aborts)));
      text(at.Applied, whole(n.appliedIndex));
      text(at.Log, whole(n.commitIndex));
      text(at.Clients, known(n.connections) ? whole(n.connections) + (known(n.maxConnections) ? " of " + whole(n.maxConnections) : "") : NONE);
      text(at["Oldest tx"], span(v(n.oldestTransaction)));
      text(at["Disk free"], known(n.diskFree) ? bytes(n.diskFree) + (n.diskTotal ? ` (${Math.floor(100 * n.diskFree / n.diskTotal)} %)` : "") : NONE);
      text(at["WAL kept"], bytes(n.wal));
      text(at["Slot lag"], bytes(n.slotLag));
      text(at["Up for"], span(v(n.uptime)));
      text(at.Heard, self ? "is this node" : known(n.contact) ? span(n.contact) + " ago" : "never");
      const versions = [n.postgres && `PostgreSQL ${n.postgres}`, n.version && `Quorate ${n.version}`].filter(Boolean).join(", ") || NONE;
      text(at.versions, versions);
      attr(at.versions, "title", versions);
      at.small.classList.toggle("old", !n.reachable);
      at.link.hidden = self || !n.http;
      if (n.http) attr(at.link, "href", `${location.protocol}//${n.http}/`);
      const actions = state.role === "operate" ? n.actions : [];
      at.menu.hidden = actions.length === 0;
      const wanted = actions.join();
      if (at.menuButtons.dataset.has !== wanted) {
        at.menuButtons.dataset.has = wanted;
        at.menuButtons.replaceChildren(...actions.map((name) => el("button", {
          type: "button", class: name === "remove" || name === "resync" ? "grave" : "",
          on: { click: () => { at.menu.open = false; act(name, n.id); } },
        }, labels[name] ?? name)));
      }
    });
  };

  const drawLinks = () => {
    const ids = state.nodes.map((n) => n.id);
    const by = new Map(state.links.map((l) => [l.to + " " + l.from, l]));
    const head = $("matrix").tHead, body = $("matrix").tBodies[0];
    if (!head.rows.length) head.append(el("tr"));
    rows(head.rows[0], [null, ...ids], () => el("th", { scope: "col" }), (th, id) => text(th, id === null ? "" : `node ${id}`));
    rows(body, ids, () => el("tr"), (tr, to) => {
      rows(tr, [null, ...ids], () => el(tr.children.length ? "td" : "th"), (cell, from) => {
        if (from === null) { attr(cell, "scope", "row"); text(cell, `node ${to} hears`); return; }
        if (!cell.children.length) cell.append(el("span"), el("small"));
        const l = by.get(to + " " + from);
        let kind = "fresh", says = "", also = "";
        if (to === from) { kind = "self"; says = "–"; }
        else if (!l || !l.known) { kind = "unknown"; says = "?"; }
        else if (l.lost) { kind = "lost"; says = known(l.age) ? `✕ ${span(l.age)}` : "✕ never"; }
        else {
          if (l.age > state.cluster?.late) kind = "late";
          says = (kind === "late" ? "▲ " : "") + span(l.age);
          also = [known(l.rtt) ? "rtt " + span(l.rtt) : "", l.loss >= 0.005 ? `${Math.round(l.loss * 100)} % lost` : ""].filter(Boolean).join(", ");
        }
        if (cell.className !== kind) cell.className = kind;
        text(cell.children[0], says);
        text(cell.children[1], also);
        attr(cell, "title", to === from ? null : { unknown: `node ${to} is not heard, so what it hears is not known`, lost: `node ${to} does not hear node ${from}` }[kind] ??
          `node ${to} last heard node ${from} ${span(l.age)} ago, jitter ${span(l.jitter)}`);
      });
    });
    // One line for each direction that is broken; for each pair of which only one is, what that means.
    const lost = state.links.filter((l) => l.known && l.lost);
    const says = lost.map((l) => {
      const back = by.get(l.from + " " + l.to);
      const since = known(l.age) ? ` for ${span(l.age)}` : "";
      return `✕ Node ${l.to} has not heard node ${l.from}${since}` + (back && back.known && !back.lost ? `; node ${l.from} does hear node ${l.to}: one direction is broken.` : ".");
    });
    if (!says.length && state.links.length) says.push(state.links.some((l) => !l.known) ? "No direction that is known is broken." : "Every node hears every other.");
    rows($("links"), says, () => el("li"), (li, s) => { text(li, s); attr(li, "data-mood", s.startsWith("✕") ? "bad" : "ok"); });
  };

  const drawTransactions = () => {
    const list = state.transactions;
    text($("transactions-count"), list.length ? String(list.length) : "");
    $("transactions-empty").hidden = list.length > 0;
    rows($("transaction-rows"), list, () => el("tr", {}, el("td", { class: "mono" }), el("td"), el("td", {}, el("span"), el("span", { class: "doubt" })), el("td", { class: "number" })), (tr, t) => {
      text(tr.children[0], t.gid);
      text(tr.children[1], `node ${t.node}`);
      text(tr.children[2].children[0], t.stage);
      text(tr.children[2].children[1], t.doubt ? " ! in doubt" : "");
      text(tr.children[3], span(t.age));
    });
  };

  // What is missing in the lists of all nodes.
  const drawSilent = () => {
    const who = state.silent.map((s) => `node ${s.node}`).join(" and ");
    for (const p of document.querySelectorAll(".silent")) {
      p.hidden = who === "";
      text(p, who && `Without ${who}, which ${state.silent.length > 1 ? "do" : "does"} not answer.`);
      attr(p, "title", state.silent.map((s) => `node ${s.node}: ${s.reason}`).join("\n") || null);
    }
  };

  const drawConflicts = () => {
    const list = state.conflicts.toReversed();
    $("conflicts-empty").hidden = list.length > 0;
    rows($("conflict-rows"), list, () => el("tr", {}, el("td"), el("td", {}, el("span"), el("small")), el("td", {}, el("span", { class: "mono" }), el("small")), el("td", { class: "mono" })), (tr, c) => {
      text(tr.children[0], when(c.at));
      text(tr.children[1].children[0], c.table || c.key ? [c.table, c.key || "(which row is unknown)"].filter(Boolean).join(" ") : "unknown");
      text(tr.children[1].children[1], c.reason);
      text(tr.children[2].children[0], c.loser || NONE);
      text(tr.children[2].children[1], c.node ? `of node ${c.node}` : "");
      text(tr.children[3], c.winner || NONE);
    });
  };

  const SAME = 2000;
  const signs = { info: ["calm", "·", ""], warning: ["warn", "!", "warning: "], error: ["bad", "✕", "error: "] };
  const drawEvents = () => {
    const grave = $("grave").checked;
    const shown = [];
    for (const e of state.events.toReversed()) {
      if (grave && e.severity === "info") continue;
      // What several nodes have noted at about the same time is told once.
      let i = shown.length - 1;
      while (i >= 0 && shown[i].time - e.time < SAME && shown[i].text !== e.text) i--;
      const same = i >= 0 && shown[i].time - e.time < SAME ? shown[i] : null;
      if (same && !same.by.includes(e.node)) same.by.push(e.node);
      else shown.push({ ...e, by: [e.node] });
    }
    $("events-empty").hidden = shown.length > 0;
    rows($("event-list"), shown, () => el("li", {}, el("time"), el("span", { class: "sign", "aria-hidden": "true" }), el("span", { class: "who" }),
      el("span", { class: "what" }, el("span", { class: "hidden" }), el("span"))), (li, e) => {
      const [mood, sign, word] = signs[e.severity] ?? signs.info;
      attr(li, "data-mood", mood);
      text(li.children[0], when(e.at));
      attr(li.children[0], "datetime", e.at);
      attr(li.children[0], "title", new Date(e.at).toLocaleString("en-GB"));
      text(li.children[1], sign);
      const everybody = e.by.length > 2 && e.by.length === state.nodes.length;
      text(li.children[2], everybody ? "all nodes" : (e.by.length > 1 ? "nodes " : "node ") + e.by.sort((a, b) => a - b).join(", "));
      text(li.children[3].children[0], word);
      text(li.children[3].children[1], e.text);
      attr(li, "title", e.kind);
    });
  };

  // ---- Charts ----------------------------------------------------------------------------------------------------

  const dashes = [[], [7, 3], [2, 2.5], [9, 3, 2, 3], [4, 4], [1, 4]];
  const css = ["solid", "dashed", "dotted", "dashed", "dashed", "dotted"];
  // keys are those that have had another value than zero, or all.
  const keys = (part, zero = true) => () => {
    const found = new Set();
    for (const s of state.samples) for (const [key, value] of Object.entries(s[part] ?? {})) if (zero || value > 0) found.add(key);
    return [...found];
  };
  const fixed = (...pairs) => () => pairs;
  // A chart is: title, unit, the names of its lines, and the value of a line in a sample; undefined leaves a gap.
  const definitions = [
    { id: "commits", title: "Commits", unit: "per second", names: fixed("cluster", "this node"), value: (s, name) => name === "cluster" ? s.commits : s.own, show: rate },
    { id: "latency50", title: "Commit latency, p50", unit: "ms, this node", names: () => state.stages, value: (s, name) => s.p50?.[name], show: span },
    { id: "latency99", title: "Commit latency, p99", unit: "ms, this node", names: () => state.stages, value: (s, name) => s.p99?.[name], show: span },
    { id: "aborts", title: "Aborts by reason", unit: "per second, this node", names: keys("aborts", false), none: "None lately.", value: (s, name) => s.aborts?.[name], show: rate },
    { id: "lag", title: "Lag", unit: "transactions", names: keys("lag"), label: (name) => `node ${name}`, value: (s, name) => s.lag?.[name], show: whole },
    { id: "queue", title: "Queue depth", unit: "transactions, this node", names: keys("queue"), value: (s, name) => s.queue?.[name], show: whole },
  ];
  const charts = [];
  let range = 600; // seconds
  let pointed = null; // the time that somebody points at, of the node's clock

  const nice = (max) => {
    if (!(max > 0)) return 1;
    const power = 10 ** Math.floor(Math.log10(max));
    for (const step of [1, 2, 4, 5, 10]) if (max <= step * power) return step * power;
    return 10 * power;
  };

  const makeChart = (d) => {
    const canvas = el("canvas", { tabindex: "0", role: "img" });
    const legend = el("ul", { class: "series" });
    if (d.none) legend.dataset.none = d.none;
    $("plots").append(el("figure", { class: "plot", id: "plot-" + d.id }, el("h3", {}, d.title + " ", el("small", {}, d.unit)), canvas, legend));
    // What a line looks like is settled when it is first seen, whichever come and go later.
    const c = { ...d, canvas, legend, looks: new Map() };
    const at = (event) => {
      const shown = sampleRange();
      const x = (event.clientX - canvas.getBoundingClientRect().left - LEFT) / (canvas.clientWidth - LEFT - RIGHT);
      return shown ? shown.from + Math.min(1, Math.max(0, x)) * (shown.to - shown.from) : null;
    };
    canvas.addEventListener("pointermove", (event) => { pointed = at(event); drawCharts(); });
    canvas.addEventListener("pointerleave", () => { pointed = null; drawCharts(); });
    canvas.addEventListener("blur", () => { pointed = null; drawCharts(); });
    canvas.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (event.key === "Escape") pointed = null;
      else if (step && state.samples.length) {
        const here = nearest(pointed ?? state.at);
        const next = Math.min(state.samples.length - 1, Math.max(0, here + step * (event.shiftKey ? 10 : 1)));
        pointed = state.samples[next].at;
        event.preventDefault();
      } else return;
      drawCharts();
      if (pointed !== null) text($("said"), describe(c, state.samples[nearest(pointed)]));
    });
    new ResizeObserver(() => drawCharts()).observe(canvas);
    charts.push(c);
  };

  const sampleRange = () => {
    const to = state.samples.at(-1)?.at;
    return to === undefined ? null : { from: to - range * 1000, to };
  };
  const nearest = (at) => {
    let low = 0, high = state.samples.length - 1;
    while (low < high) {
      const mid = (low + high) >> 1;
      if (state.samples[mid].at < at) low = mid + 1; else high = mid;
    }
    if (low > 0 && at - state.samples[low - 1].at < state.samples[low].at - at) low--;
    return low;
  };
  const describe = (c, s) => `${c.title}, ${clock(s.at)}: ` + (c.names().map((name) => `${c.label ? c.label(name) : name} ${c.show(c.value(s, name))}`).join(", ") || "nothing yet");

  const LEFT = 44, RIGHT = 8, TOP = 8, BOTTOM = 20;
  let palette = null;
  const colours = () => {
    if (palette) return palette;
    // Through an element: the variables themselves still say light-dark().
    const probe = el("span", { hidden: "" });
    document.body.append(probe);
    const get = (name) => { probe.style.color = `var(${name})`; return getComputedStyle(probe).color; };
    palette = { lines: ["--s1", "--s2", "--s3", "--s4", "--s5", "--s6"].map(get), muted: get("--muted"), grid: get("--line"), cross: get("--strong-line"), panel: get("--panel") };
    probe.remove();
    return palette;
  };

  const drawCharts = () => {
    const shown = sampleRange();
    const samples = shown ? state.samples.slice(nearest(shown.from)) : [];
    const mark = shown && pointed !== null ? state.samples[nearest(Math.max(pointed, shown.from))] : null;
    for (const c of charts) drawChart(c, shown, samples, mark);
  };

  const drawChart = (c, shown, samples, mark) => {
    const { lines, muted, grid, cross } = colours();
    const names = c.names();
    for (const name of names) if (!c.looks.has(name)) c.looks.set(name, c.looks.size);
    rows(c.legend, names, () => el("li", {}, el("i"), el("span"), el("b")), (li, name) => {
      const i = c.looks.get(name);
      li.children[0].style.borderTopColor = lines[i % lines.length];
      li.children[0].style.borderTopStyle = css[i % css.length];
      text(li.children[1], c.label ? c.label(name) : name);
      const s = mark ?? samples.at(-1);
      text(li.children[2], s ? c.show(c.value(s, name)) : NONE);
    });
    const ratio = devicePixelRatio || 1, width = c.canvas.clientWidth, height = c.canvas.clientHeight;
    if (!width) return;
    if (c.canvas.width !== Math.round(width * ratio) || c.canvas.height !== Math.round(height * ratio)) {
      c.canvas.width = Math.round(width * ratio);
      c.canvas.height = Math.round(height * ratio);
    }
    const g = c.canvas.getContext("2d");
    g.setTransform(ratio, 0, 0, ratio, 0, 0);
    g.clearRect(0, 0, width, height);
    let most = 0;
    for (const s of samples) for (const name of names) most = Math.max(most, c.value(s, name) ?? 0);
    const top = nice(most);
    const y = (v) => height - BOTTOM - v / top * (height - TOP - BOTTOM);
    g.font = "11px system-ui, sans-serif";
    g.fillStyle = muted;
    g.strokeStyle = grid;
    g.lineWidth = 1;
    g.textAlign = "right";
    g.textBaseline = "middle";
    for (const part of [0, 0.5, 1]) {
      const at = Math.round(y(top * part)) + 0.5;
      g.beginPath(); g.moveTo(LEFT, at); g.lineTo(width - RIGHT, at); g.stroke();
      const v = top * part;
      g.fillText(v >= 10000 ? v / 1000 + "k" : String(+v.toPrecision(3)), LEFT - 6, at);
    }
    if (!shown) return;
    const x = (at) => LEFT + (at - shown.from) / (shown.to - shown.from) * (width - LEFT - RIGHT);
    g.textBaseline = "alphabetic";
    const every = range > 300 ? 120000 : 30000;
    for (let at = Math.ceil(shown.from / every) * every; at <= shown.to; at += every) {
      const label = new Date(at).toLocaleTimeString("en-GB", range > 300 ? { hour: "2-digit", minute: "2-digit" } : undefined);
      const half = g.measureText(label).width / 2;
      if (x(at) - half < LEFT - 8 || x(at) + half > width) continue;
      g.textAlign = "center";
      g.fillText(label, x(at), height - 5);
    }
    for (const name of names) {
      const i = c.looks.get(name);
      g.strokeStyle = lines[i % lines.length];
      g.lineWidth = 1.75;
      g.lineJoin = "round";
      g.setLineDash(dashes[i % dashes.length]);
      g.beginPath();
      let before = null;
      for (const s of samples) {
        const v = c.value(s, name);
        // A line does not lead over a time of which nothing is known.
        if (v === undefined || s.at < shown.from) { if (v === undefined) before = null; continue; }
        if (before === null || s.at - before > 3500) g.moveTo(x(s.at), y(v)); else g.lineTo(x(s.at), y(v));
        if (before === null) g.lineTo(x(s.at) + 0.01, y(v)); // a point alone is visible too
        before = s.at;
      }
      g.stroke();
    }
    g.setLineDash([]);
    if (mark) {
      g.strokeStyle = cross;
      g.lineWidth = 1;
      g.beginPath(); g.moveTo(Math.round(x(mark.at)) + 0.5, TOP); g.lineTo(Math.round(x(mark.at)) + 0.5, height - BOTTOM); g.stroke();
      for (const name of names) {
        const v = c.value(mark, name);
        if (v === undefined) continue;
        g.fillStyle = lines[c.looks.get(name) % lines.length];
        g.beginPath(); g.arc(x(mark.at), y(v), 3, 0, 7); g.fill();
      }
      g.fillStyle = muted;
      g.textBaseline = "top";
      g.textAlign = x(mark.at) > width / 2 ? "right" : "left";
      g.fillText(clock(mark.at), x(mark.at) + (x(mark.at) > width / 2 ? -5 : 5), TOP);
    }
    if (samples.length) attr(c.canvas, "aria-label", describe(c, samples.at(-1)) + ". Arrow keys go back in time.");
  };

  // ---- Actions ---------------------------------------------------------------------------------------------------

  const questions = {
    drain: (id) => [`Drain node ${id}?`, `Node ${id} takes no new clients, ends idle sessions, lets transactions end, and hands leadership over. It goes on to replicate and to vote.`, "Drain", false],
    resume: (id) => [`Resume node ${id}?`, `Node ${id} takes clients again.`, "Resume", false],
    transfer: (id) => [`Make node ${id} the leader?`, "Commits wait for a moment while leadership moves.", "Transfer leadership", false],
    resync: (id) => [`Resync node ${id}?`, `The data of node ${id} are set aside, and it is cloned anew from another node. It takes no clients meanwhile.`, "Resync", true],
    remove: (id) => [`Remove node ${id}?`, `Node ${id} leaves the cluster for good. It can come back only as a new node.`, "Remove", true],
  };
  const act = (action, id) => {
    const dialog = $("ask"), form = dialog.querySelector("form"), input = $("ask-input"), yes = $("ask-yes");
    const [title, explains, does, typed] = questions[action](id);
    text($("ask-title"), title);
    text($("ask-text"), explains);
    text(yes, does);
    text($("ask-error"), "");
    text($("ask-name"), `node ${id}`);
    $("ask-type").hidden = !typed;
    yes.className = typed ? "danger" : "primary";
    input.value = "";
    const ready = () => { yes.disabled = typed && input.value.trim() !== `node ${id}`; };
    ready();
    input.oninput = ready;
    $("ask-no").onclick = () => dialog.close();
    form.onsubmit = async (event) => {
      event.preventDefault();
      yes.disabled = true;
      text(yes, "Working…");
      try {
        const response = await fetch("dashboard/action", {
          method: "POST", headers: { "Content-Type": "application/json" },
          body: JSON.stringify({ action, node: id, confirm: typed ? input.value.trim() : "" }),
        });
        const answer = await response.json();
        if (!response.ok) throw new Error(answer.error || `HTTP status ${response.status}`);
        dialog.close();
        toast(answer.message || `${does}: done.`);
      } catch (error) {
        text($("ask-error"), `Not done: ${error.message}`);
        text(yes, does);
        ready();
      }
    };
    dialog.showModal();
  };

  let toasting = 0;
  const toast = (says) => {
    text($("toast"), says);
    clearTimeout(toasting);
    toasting = setTimeout(() => text($("toast"), ""), 8000);
  };

  // ---- Drawing ---------------------------------------------------------------------------------------------------

  const painters = [
    [["verdict"], () => state.verdict && drawVerdict()],
    [["cluster", "nodes"], drawVoters],
    [["cluster", "samples"], () => state.cluster && drawFacts()],
    [["nodes", "cluster"], drawNodes],
    [["links", "nodes", "cluster"], drawLinks],
    [["transactions"], drawTransactions],
    [["silent"], drawSilent],
    [["conflicts"], drawConflicts],
    [["events"], drawEvents],
    [["samples"], drawCharts],
  ];
  let asked = false;
  // draw paints what has changed, once a frame however much comes.
  const draw = () => {
    if (asked) return;
    asked = true;
    requestAnimationFrame(() => {
      asked = false;
      for (const [parts, paint] of painters) if (parts.some((p) => changed.has(p))) paint();
      changed.clear();
    });
  };

  const start = () => {
    const button = $("theme");
    const say = () => text(button, "Theme: " + theme);
    say();
    button.addEventListener("click", () => {
      theme = themes[(themes.indexOf(theme) + 1) % themes.length];
      root.dataset.theme = theme;
      remember("quorate-theme", theme);
      say();
      palette = null;
      drawCharts();
    });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { palette = null; drawCharts(); });
    $("leave").addEventListener("click", signOut);
    $("grave").addEventListener("change", drawEvents);
    $("range").addEventListener("change", (event) => { range = Number(event.target.value); drawCharts(); });
    document.addEventListener("click", (event) => {
      for (const menu of document.querySelectorAll(".menu[open]")) if (!menu.contains(event.target)) menu.open = false;
    });
    document.addEventListener("keydown", (event) => {
      if (event.key !== "Escape") return;
      for (const menu of document.querySelectorAll(".menu[open]")) { menu.open = false; menu.querySelector("summary").focus(); }
    });
    addEventListener("online", () => waking());
    document.addEventListener("visibilitychange", () => { if (!document.hidden) { waking(); draw(); } });
    definitions.forEach(makeChart);
    setInterval(() => { mood(); announceStale(); }, 250);
    listen();
  };
  document.addEventListener("DOMContentLoaded", start);
})();
