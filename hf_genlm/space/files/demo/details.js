// Details of a touched token, in a card beside it, or at the bottom of a narrow screen.
(() => {
  const percent = (p) => (p >= 0.0995 ? (100 * p).toFixed(0) : p >= 0.001 ? (100 * p).toFixed(1) : (100 * p).toPrecision(1)) + " %";
  let card;
  let pinned = null;

  const element = (tag, text, className) => {
    const made = document.createElement(tag);
    if (text !== undefined) made.textContent = text;  // not as HTML: a model may generate any text
    if (className) made.className = className;
    return made;
  };

  const bar = (name, share, isChosen) => {
    const row = element("div", undefined, isChosen ? "row chosen" : "row");
    row.append(element("code", name), element("span", percent(share)));
    const line = element("i");
    line.style.width = `${Math.max(1, 100 * share)}%`;
    row.append(line);
    return row;
  };

  const ofToken = (token) => {
    const part = element("section");
    const head = element("div", undefined, "head");
    head.append(element("code", token.text));
    const said = token.p === null ? "not scored: no token before it" : `${percent(token.p)}, rank ${token.rank.toLocaleString("en")}`;
    head.append(element("span", said));
    part.append(head);
    for (const [name, share] of token.others) part.append(bar(name, share, name === token.text));
    return part;
  };

  const ofAttention = (detail) => {
    const part = element("section");
    const head = element("div", undefined, "head");
    head.append(element("code", detail.text), element("span", `${percent(detail.share)} of the attention`));
    part.append(head);
    if (detail.heads.length > 1) detail.heads.slice(0, 12).forEach((share, i) => part.append(bar(`head ${i + 1}`, share)));
    return part;
  };

  const ofGain = (detail) => {
    const part = element("section");
    const head = element("div", undefined, "head");
    head.append(element("code", detail.text), element("span", "bits"));
    part.append(head);
    for (const [name, bits] of detail.bits) {
      const row = element("div", undefined, "row");
      row.append(element("span", name), element("span", bits.toFixed(2)));
      part.append(row);
    }
    return part;
  };

  const place = (target) => {
    const box = target.getClientRects()[0] || target.getBoundingClientRect();
    const isNarrow = window.innerWidth < 640;
    card.classList.toggle("docked", isNarrow);
    if (isNarrow) {
      card.style.left = card.style.top = "";
      if (pinned && box.bottom > card.getBoundingClientRect().top) pinned.scrollIntoView({ block: "center" });
      return;
    }
    const left = Math.min(Math.max(8, box.left), window.innerWidth - card.offsetWidth - 8);
    const isBelow = box.bottom + card.offsetHeight + 12 < window.innerHeight;
    card.style.left = `${left}px`;
    card.style.top = `${isBelow ? box.bottom + 6 : Math.max(8, box.top - card.offsetHeight - 6)}px`;
  };

  const show = (target, parts) => {
    if (!card) { card = element("div"); card.id = "token-card"; card.setAttribute("role", "status"); document.body.append(card); }
    card.classList.toggle("dark", document.body.classList.contains("dark"));
    card.replaceChildren(...parts);
    card.hidden = false;
    place(target);
  };

  const hide = () => {
    if (card) card.hidden = true;
    pinned?.classList.remove("pinned");
    pinned = null;
  };

  const read = (target) => {
    const detail = JSON.parse(target.dataset.tokens);
    show(target, Array.isArray(detail) ? detail.map(ofToken) : [detail.bits ? ofGain(detail) : ofAttention(detail)]);
  };

  const readPicture = (event, axis) => {
    const names = JSON.parse(axis.dataset.columns);
    const box = axis.getBoundingClientRect();
    const column = Math.min(names.length - 1, Math.max(0, Math.floor(((event.clientX - box.left) / box.width) * names.length)));
    const head = element("div", undefined, "head");
    head.append(element("code", names[column]), element("span", `token ${column + 1} of ${names.length}`));
    show({ getClientRects: () => [{ left: event.clientX, top: box.top, bottom: box.bottom }] }, [head]);
  };

  document.addEventListener("pointerover", (event) => {
    if (event.pointerType === "touch" || pinned) return;
    const target = event.target.closest?.(".token");
    if (target) read(target); else if (!event.target.closest?.(".axis, #token-card")) hide();
  });
  document.addEventListener("pointermove", (event) => {
    const axis = pinned ? null : event.target.closest?.(".axis");
    if (axis) readPicture(event, axis);
  });
  document.addEventListener("click", (event) => {
    const target = event.target.closest?.(".token");
    const isSame = target === pinned;
    if (!event.target.closest?.("#token-card, .axis")) hide();
    if (target && !isSame) { pinned = target; target.classList.add("pinned"); read(target); }
  });
  document.addEventListener("focusin", (event) => {
    if (event.target.matches?.(".token:focus-visible")) read(event.target);
  });
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });
  window.addEventListener("scroll", () => { if (window.innerWidth >= 640) hide(); }, { passive: true });
})();
