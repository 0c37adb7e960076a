'use strict';
(() => {
  const data = JSON.parse(document.getElementById('data').textContent);
  const $ = (id) => document.getElementById(id);
  const VIDEO = /\.(mp4|webm|mov)(\?|#|$)/i;
  const SIZES = [24, 60, 120, 240];
  const KEYS = [
    ['← →', 'previous, next page; in the enlarged view: image'], ['Home End', 'first, last page; first, last image'],
    ['j k', 'select the next, previous image'], ['Enter', 'enlarge the selected image; then: fit or actual size'],
    ['+ − 0', 'zoom in, out, to fit; so does the wheel, and dragging moves'], ['Space', 'show the next run alone, then all side by side'],
    ['/', 'search'], ['Esc', 'close'], ['?', 'these keys'],
  ];
  const state = { shown: data.items.map((_, i) => i), page: 1, size: 60, current: 0, open: false, only: -1, zoom: 1, x: 0, y: 0 };

  const element = (name, attributes = {}, ...children) => {
    const node = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) key in node ? (node[key] = value) : node.setAttribute(key, value);
    node.append(...children);
    return node;
  };
  const clamp = (value, low, high) => Math.min(Math.max(value, low), high);
  const pages = () => Math.max(1, Math.ceil(state.shown.length / state.size));

  // of runs that have the sample: whether they started from one noise
  const NOISE = { same: 'same noise', other: 'different noise', unknown: 'noise not known' };
  function noiseOf(item) {
    const hashes = item.noise.filter((_, column) => item.sources[column]);
    if (hashes.length < 2) return null;
    if (new Set(hashes.filter(Boolean)).size > 1) return 'other';
    return hashes.every(Boolean) ? 'same' : 'unknown';
  }
  function noiseMark(item) {
    const kind = noiseOf(item);
    const hashes = item.noise.map((noise, column) => `${data.columns[column].name}: ${noise ?? 'not known'}`);
    return kind ? [element('span', { className: `noise ${kind}`, dir: 'ltr', title: hashes.join('\n') }, NOISE[kind])] : [];
  }

  function picture(source, alt) {
    if (!source) return element('div', { className: 'missing' }, 'missing');
    const isVideo = VIDEO.test(source);
    const node = isVideo ? element('video', { muted: true, loop: true, preload: 'metadata', playsInline: true, ariaLabel: alt })
      : element('img', { loading: 'lazy', decoding: 'async', alt });
    const event = isVideo ? 'loadedmetadata' : 'load';
    node.addEventListener(event, () => node.classList.toggle('small', (node.naturalWidth || node.videoWidth) <= 128));
    node.addEventListener('error', () => node.replaceWith(element('div', { className: 'missing' }, 'missing')));
    node.src = source;
    return node;
  }

  function card(position) {
    const item = data.items[state.shown[position]];
    const row = element('div', { className: 'row' });
    item.sources.forEach((source, column) => {
      const cell = element('div');
      if (data.columns.length > 1) cell.append(element('div', { className: 'label', title: data.columns[column].name }, data.columns[column].name));
      const button = element('button', { className: 'picture', type: 'button', ariaLabel: `enlarge ${item.id}` }, picture(source, item.caption));
      button.addEventListener('click', () => { select(position); enlarge(); });
      cell.append(button);
      row.append(cell);
    });
    const text = element('p', { className: 'text', dir: 'auto' }, element('b', {}, `${item.id} `), ...noiseMark(item), item.caption);
    const node = element('article', { className: 'item' }, row, text);
    node.dataset.position = position;
    return node;
  }

  function render() {
    state.page = clamp(state.page, 1, pages());
    const start = (state.page - 1) * state.size;
    const end = Math.min(start + state.size, state.shown.length);
    const cards = [];
    for (let position = start; position < end; position++) cards.push(card(position));
    $('grid').replaceChildren(...cards);
    $('page').value = state.page;
    $('page').max = $('pages').textContent = pages();
    $('first').disabled = $('previous').disabled = state.page === 1;
    $('last').disabled = $('next').disabled = state.page === pages();
    $('count').textContent = state.shown.length ? `${start + 1}–${end} of ${state.shown.length}` : 'nothing found';
    mark();
  }

  function mark() {
    for (const node of $('grid').children) node.classList.toggle('current', Number(node.dataset.position) === state.current);
  }

  function remember() {
    const hash = state.open ? `#item=${data.items[state.shown[state.current]].id}` : `#page=${state.page}`;
    try { history.replaceState(null, '', hash); } catch { location.hash = hash; }
  }

  function turn(page) {
    state.page = clamp(page, 1, pages());
    state.current = (state.page - 1) * state.size;
    render();
    scrollTo(0, 0);
    remember();
  }

  function select(position) {
    if (!state.shown.length) return;
    state.current = clamp(position, 0, state.shown.length - 1);
    const page = Math.floor(state.current / state.size) + 1;
    if (page !== state.page) { state.page = page; render(); } else mark();
    $('grid').querySelector('.current')?.scrollIntoView({ block: 'nearest' });
    if (state.open) enlarge();
  }

  function fit() { state.zoom = 1; state.x = state.y = 0; place(); }

  function place() {
    for (const node of $('stage').querySelectorAll('img, video')) {
      node.style.transform = `translate(${state.x}px, ${state.y}px) scale(${state.zoom})`;
    }
  }

  function zoomTo(zoom, x = null, y = null) {
    const figure = $('stage').querySelector('figure');
    if (!figure) return;
    const area = figure.getBoundingClientRect();
    const [px, py] = x === null ? [area.width / 2, area.height / 2] : [(x - area.left) % area.width, y - area.top];
    const next = clamp(zoom, 0.25, 64);
    state.x = px - (px - state.x) * next / state.zoom;
    state.y = py - (py - state.y) * next / state.zoom;
    state.zoom = next;
    place();
  }

  function actualZoom() {
    const image = $('stage').querySelector('img, video');
    if (!image) return 1;
    const area = image.parentElement.getBoundingClientRect();
    const [w, h] = [image.naturalWidth || image.videoWidth, image.naturalHeight || image.videoHeight];
    return w && h ? 1 / Math.min(area.width / w, area.height / h) : 1;
  }

  function enlarge() {
    const item = data.items[state.shown[state.current]];
    if (!item) return;
    const wanted = item.sources.map((source, column) => [source, column]).filter(([, column]) => state.only < 0 || column === state.only);
    $('stage').replaceChildren(...wanted.map(([source, column]) => {
      const node = picture(source, item.caption);
      if (node.tagName === 'IMG') node.loading = 'eager';
      if (node.tagName === 'VIDEO') { node.controls = true; node.autoplay = true; }
      const figure = element('figure', {}, node);
      if (data.columns.length > 1) figure.append(element('figcaption', {}, data.columns[column].name));
      return figure;
    }));
    $('where').textContent = `${item.id}  (${state.current + 1} of ${state.shown.length})`;
    const [hash] = wanted.map(([, column]) => item.noise[column]).filter(Boolean);
    $('noise').replaceChildren(...(wanted.length > 1 ? noiseMark(item) : hash ? [`noise ${hash}`] : []));
    $('caption').textContent = item.caption;
    state.open = true;
    if (!$('box').open) $('box').showModal();
    $('stage').focus();
    fit();
    remember();
  }

  function closed() {
    if (!state.open) return;
    state.open = false;
    $('stage').replaceChildren();
    remember();
  }
  function close() { if ($('box').open) $('box').close(); closed(); }
  $('box').addEventListener('close', closed); // by the browser itself

  function search() {
    const words = $('search').value.toLowerCase().split(/\s+/).filter(Boolean);
    state.shown = data.items.map((_, i) => i).filter((i) => {
      const text = `${data.items[i].id} ${data.items[i].caption}`.toLowerCase();
      return words.every((word) => text.includes(word));
    });
    turn(1);
  }

  function table(rows) {
    return element('table', {}, ...rows.map(([head, ...cells]) =>
      element('tr', {}, element('th', { scope: 'row' }, head), ...cells.map((cell) => element('td', {}, cell)))));
  }

  function written(number) {
    if (number === undefined) return '–';
    return typeof number === 'number' ? String(Number(number.toPrecision(6))) : String(number); // 'nan', 'inf'
  }

  function showFacts() {
    const names = [...new Set(data.columns.flatMap((column) => Object.keys(column.numbers)))];
    const rows = [['', ...data.columns.map((column) => column.name)]];
    for (const name of names) {
      rows.push([name, ...data.columns.map((column) => written(column.numbers[name]))]);
    }
    const kinds = data.items.map(noiseOf).filter(Boolean);
    const counts = Object.keys(NOISE).map((kind) => [kind, kinds.filter((other) => other === kind).length]);
    const told = counts.filter(([, count]) => count).map(([kind, count]) => `${count} ${NOISE[kind]}`);
    const blocks = names.length ? [table(rows)] : [];
    if (told.length) blocks.push(element('p', {}, `samples in several runs: ${told.join(', ')}`));
    for (const column of data.columns) {
      if (Object.keys(column.facts).length) {
        blocks.push(element('div', {}, column.name), element('pre', {}, JSON.stringify(column.facts, null, 1)));
      }
    }
    $('facts').hidden = !blocks.length;
    $('tables').append(...blocks);
    $('columns').hidden = true;
  }

  function key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || $('keys').open) return;
    if (event.target.matches('input, select') && event.target.type !== 'range') {
      if (event.key === 'Escape') event.target.blur();
      return;
    }
    if (event.target.type === 'range' || (event.key === ' ' && !state.open)) return;
    const isPicture = event.target.matches('.picture');
    if (event.key === 'Enter' && !state.open && !isPicture && event.target.matches('button, summary')) return;
    const inGrid = {
      ArrowLeft: () => turn(state.page - 1), ArrowRight: () => turn(state.page + 1), Home: () => turn(1), End: () => turn(pages()),
      j: () => select(state.current + 1), k: () => select(state.current - 1), '/': () => $('search').focus(), '?': () => $('keys').showModal(),
      Enter: () => { if (isPicture) select(Number(event.target.closest('.item').dataset.position)); enlarge(); },
    };
    const inBox = {
      ArrowLeft: () => select(state.current - 1), ArrowRight: () => select(state.current + 1), j: () => select(state.current + 1),
      k: () => select(state.current - 1), Home: () => select(0), End: () => select(state.shown.length - 1), Escape: close,
      '+': () => zoomTo(state.zoom * 1.5), '=': () => zoomTo(state.zoom * 1.5), '-': () => zoomTo(state.zoom / 1.5), 0: fit,
      Enter: () => (state.zoom === 1 ? zoomTo(actualZoom()) : fit()),
      ' ': () => { state.only = state.only + 1 >= data.columns.length ? -1 : state.only + 1; enlarge(); },
    };
    const action = (state.open ? inBox : inGrid)[event.key];
    if (action) { event.preventDefault(); action(); }
  }

  let held = null;
  $('stage').addEventListener('wheel', (event) => { event.preventDefault(); zoomTo(state.zoom * Math.exp(-event.deltaY / 400), event.clientX, event.clientY); }, { passive: false });
  $('stage').addEventListener('pointerdown', (event) => { held = [event.clientX - state.x, event.clientY - state.y]; $('stage').setPointerCapture(event.pointerId); });
  $('stage').addEventListener('pointermove', (event) => { if (held) { state.x = event.clientX - held[0]; state.y = event.clientY - held[1]; place(); } });
  for (const name of ['pointerup', 'pointercancel']) $('stage').addEventListener(name, () => { held = null; });
  $('stage').addEventListener('dblclick', () => (state.zoom === 1 ? zoomTo(2) : fit()));
  $('close').addEventListener('click', close);
  $('first').addEventListener('click', () => turn(1));
  $('previous').addEventListener('click', () => turn(state.page - 1));
  $('next').addEventListener('click', () => turn(state.page + 1));
  $('last').addEventListener('click', () => turn(pages()));
  $('help').addEventListener('click', () => $('keys').showModal());
  $('page').addEventListener('change', () => turn(Number($('page').value) || 1));
  $('size').addEventListener('change', () => { state.size = Number($('size').value); turn(1); });
  const setWidth = () => $('grid').style.setProperty('--item', `min(100%, ${$('width').value * Math.max(1, data.columns.length)}px)`);
  $('width').addEventListener('input', setWidth);
  $('search').addEventListener('input', search);
  document.addEventListener('keydown', key);
  window.addEventListener('hashchange', follow);

  function follow() {
    const [name, value] = location.hash.slice(1).split('=');
    if (name === 'item') {
      const position = state.shown.findIndex((i) => String(data.items[i].id) === value);
      if (position >= 0) { select(position); enlarge(); return; }
    }
    close();
    turn(name === 'page' ? Number(value) || 1 : 1);
  }

  document.title = $('title').textContent = data.title;
  $('size').append(...SIZES.map((size) => element('option', { value: size, selected: size === state.size }, String(size))));
  $('keytable').append(...table(KEYS).children);
  setWidth();
  showFacts();
  render();
  follow();
})();
