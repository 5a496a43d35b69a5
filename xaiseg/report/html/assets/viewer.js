// The 3-D viewer of a subject: NiiVue and the volumes lie in this page as text, and are unpacked when they are asked for.
{
  const element = (id) => document.getElementById(id);
  const stage = element('stage');
  const scans = JSON.parse(element('scans').textContent);
  const status = element('where');
  const controls = {};
  for (const name of ['scan', 'lesion', 'channel', 'map', 'threshold', 'opacity', 'zoom', 'planes', 'outline']) controls[name] = element(name);
  let viewer = null;
  let library = null;
  let shown = {};  // what is loaded, by role
  let turn = Promise.resolve();  // one change after another

  const unpacked = async (id) => {
    const text = atob(element(id).textContent);
    const bytes = Uint8Array.from(text, (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream('gzip'));
    return new Response(stream).arrayBuffer();
  };
  const run = (url) => new Promise((done, failed) => {
    const script = document.createElement('script');
    script.src = url;
    script.onload = done;
    script.onerror = () => failed(new Error('NiiVue could not be started'));
    document.head.append(script);
  });
  const volume = async (id, options) => {
    const file = new File([await unpacked(id)], `${id}.nii`);
    return library.NVImage.loadFromFile({ file, name: `${id}.nii`, ...options });
  };
  const say = (text) => { status.textContent = text; };
  const scan = () => scans[controls.scan.value];
  const lesion = () => scan().lesions[controls.lesion.value];

  // The colours of the pictures: transparent zero, opaque from 30 % of the limit on.
  const colours = (stops) => ({
    R: stops.map((c) => c[0]), G: stops.map((c) => c[1]), B: stops.map((c) => c[2]),
    A: [0, 235, 235, 235, 235].slice(0, stops.length), I: [0, 77, 128, 190, 255],
  });
  const HOT = colours([[208, 16, 0], [224, 32, 0], [255, 51, 0], [255, 154, 0], [255, 240, 138]]);
  const COLD = colours([[18, 56, 216], [24, 80, 232], [31, 112, 255], [51, 187, 255], [200, 247, 255]]);
  const LESIONS = { R: [0, 60, 125], G: [0, 190, 255], B: [0, 90, 138], A: [0, 70, 150], I: [0, 128, 255] };

  const fill = (select, names) => {
    select.replaceChildren(...names.map((name, n) => new Option(name, n)));
    select.disabled = names.length === 0;
  };
  const replace = (role, next) => {
    if (shown[role]) viewer.removeVolume(shown[role]);
    shown[role] = next;
    if (next) viewer.addVolume(next);
  };

  const showScan = async () => {
    const now = scan();
    for (const role of ['map', 'labels', 'image']) replace(role, null);
    fill(controls.lesion, now.lesions.map((l) => `${l.number} · ${l.group} · ${l.volume}`));
    fill(controls.channel, now.channels.map((c) => c.name));
    await showImage();
  };
  const showImage = async () => {
    const now = scan();
    const channel = now.channels[controls.channel.value];
    for (const role of ['map', 'labels', 'image']) replace(role, null);
    replace('image', await volume(channel.id, { colormap: 'gray', cal_min: channel.low, cal_max: channel.high }));
    replace('labels', await volume(now.labels, { colormap: 'lesions', cal_min: 0, cal_max: 2 }));
    shown.numbers = Int16Array.from(shown.labels.img);
    await showLesion(false);
  };
  const showLesion = async (fresh = true) => {
    const now = lesion();
    if (!now) return say('No lesion of this scan is in the table.');
    if (fresh || !controls.map.options.length || controls.map.dataset.lesion !== String(now.number)) {
      const before = controls.map.value;
      fill(controls.map, now.maps.map((m) => m.name));
      if (before && before < now.maps.length) controls.map.value = before;
      controls.map.dataset.lesion = String(now.number);
    }
    mark();
    await showMap();
    centre();
  };
  const mark = () => {
    const number = lesion() ? lesion().number : -1;
    const on = controls.outline.checked;
    const image = shown.labels.img;
    shown.numbers.forEach((label, n) => { image[n] = !on || label === 0 ? 0 : label === number ? 2 : 1; });
    shown.labels.cal_min = 0;
    shown.labels.cal_max = 2;
    viewer.updateGLVolume();
  };
  const showMap = async () => {
    const map = lesion().maps[controls.map.value];
    if (!map) {
      replace('map', null);
      return say('No saliency map of this lesion was saved.');
    }
    replace('map', await volume(map.id, { colormap: 'hot-map', cal_min: 0, cal_max: map.limit }));
    shown.map.colormapNegative = map.signed ? 'cold-map' : '';
    threshold();
  };
  const threshold = () => {
    const map = lesion() && lesion().maps[controls.map.value];
    if (!map || !shown.map) return;
    const share = controls.threshold.value / 100;
    const least = Math.max(share, 0.004) * map.limit;
    shown.map.cal_min = least;
    shown.map.cal_max = Math.max(map.limit, 1e-12);
    shown.map.cal_minNeg = -least;
    shown.map.cal_maxNeg = -shown.map.cal_max;
    // 2: below the threshold nothing is drawn
    shown.map.colormapType = share > 0 ? 2 : 0;
    shown.map.opacity = controls.opacity.value / 100;
    element('threshold-value').textContent = `${controls.threshold.value} % (${(share * map.limit).toPrecision(2)})`;
    element('opacity-value').textContent = `${controls.opacity.value} %`;
    viewer.updateGLVolume();
  };
  const centre = () => {
    if (!lesion()) return;
    viewer.scene.crosshairPos = viewer.mm2frac(lesion().centre);
    zoom();
    viewer.createOnLocationChange();
    viewer.drawScene();
  };
  const zoom = () => {  // about the cross
    const by = Number(controls.zoom.value);
    const [x, y, z] = viewer.frac2mm(viewer.scene.crosshairPos);
    viewer.scene.pan2Dxyzmm = [(1 - by) * x, (1 - by) * y, (1 - by) * z, by];
    element('zoom-value').textContent = `${by} ×`;
    viewer.drawScene();
  };
  const planes = () => {
    viewer.setSliceType(Number(controls.planes.value));
    viewer.drawScene();
  };
  const step = (by) => {
    const count = controls.lesion.options.length;
    if (!count) return;
    controls.lesion.value = (Number(controls.lesion.value) + by + count) % count;
    change(showLesion);
  };
  const change = (what) => {
    stage.dataset.state = 'busy';
    turn = turn.then(what).then(
      () => { stage.dataset.state = 'ready'; },
      (error) => { stage.dataset.state = 'failed'; say(`The viewer cannot show this: ${error.message}`); },
    );
    return turn;
  };

  const open = async () => {
    element('viewer').hidden = false;
    element('open').hidden = true;
    if (!document.createElement('canvas').getContext('webgl2')) {
      stage.hidden = true;
      for (const node of document.querySelectorAll('.viewer .controls')) node.hidden = true;
      throw new Error('this browser has no WebGL 2. The pictures below show every lesion in three planes.');
    }
    if (typeof DecompressionStream === 'undefined') throw new Error('this browser is too old to unpack the volumes.');
    say('Unpacking …');
    const url = URL.createObjectURL(new Blob([await unpacked('niivue')], { type: 'text/javascript' }));
    await run(url);
    URL.revokeObjectURL(url);
    library = window.niivue;
    viewer = new library.Niivue({
      backColor: [0.055, 0.059, 0.071, 1], crosshairColor: [0.49, 1, 0.54, 0.55], crosshairWidth: 0.25, crosshairWidthUnit: 'percent', crosshairGap: 4, isRadiologicalConvention: true,
      isNearestInterpolation: true, sagittalNoseLeft: true, multiplanarShowRender: 1, multiplanarLayout: 2, dragAndDropEnabled: false, logLevel: 'error', loadingText: '',
      show3Dcrosshair: true, textHeight: 0.045, multiplanarPadPixels: 3, scrollRequiresFocus: true,
    });
    viewer.onLocationChange = (at) => {
      const place = [...at.mm].slice(0, 3).map((v) => v.toFixed(0)).join(', ');
      const values = at.values.filter((v) => v.name !== `${scan().labels}.nii`).map((v) => Number(v.value).toPrecision(3));
      say(`${place} mm (right, front, up) · scan ${values[0]}${values.length > 1 ? ` · saliency ${values[1]}` : ''}`);
    };
    await viewer.attachToCanvas(element('canvas'));
    viewer.addColormap('hot-map', HOT);
    viewer.addColormap('cold-map', COLD);
    viewer.addColormap('lesions', LESIONS);
    planes();
    await showScan();
  };

  let opened = null;
  const begin = () => { opened = opened || change(open); return opened; };
  const choose = async (place) => {
    await begin();
    if (!viewer) return;
    const [s, l] = place.split('/');
    await change(async () => {
      if (controls.scan.value !== s) { controls.scan.value = s; await showScan(); }
      controls.lesion.value = l;
      await showLesion();
    });
    element('viewer').scrollIntoView({ block: 'nearest' });
  };
  fill(controls.scan, scans.map((s) => s.name));
  element('open').addEventListener('click', begin);
  controls.scan.addEventListener('change', () => change(showScan));
  controls.lesion.addEventListener('change', () => change(showLesion));
  controls.channel.addEventListener('change', () => change(showImage));
  controls.map.addEventListener('change', () => change(showMap));
  controls.threshold.addEventListener('input', threshold);
  controls.opacity.addEventListener('input', threshold);
  controls.zoom.addEventListener('input', zoom);
  controls.planes.addEventListener('change', planes);
  controls.outline.addEventListener('change', mark);
  element('previous').addEventListener('click', () => step(-1));
  element('next').addEventListener('click', () => step(1));
  element('centre').addEventListener('click', centre);
  for (const button of document.querySelectorAll('[data-show]')) {
    button.hidden = false;
    button.addEventListener('click', () => choose(button.dataset.show));
  }
}
