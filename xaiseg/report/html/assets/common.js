'use strict';
// The chapter that is read, in the table of contents.
{
  const links = new Map([...document.querySelectorAll('.contents a')].map((a) => [a.hash.slice(1), a]));
  const seen = new IntersectionObserver((entries) => {
    const now = entries.filter((e) => e.isIntersecting).map((e) => links.get(e.target.id)).pop();
    if (!now) return;
    for (const link of links.values()) link.removeAttribute('aria-current');
    now.setAttribute('aria-current', 'true');
  }, { rootMargin: '-15% 0px -75% 0px' });
  for (const id of links.keys()) {
    const section = document.getElementById(id);
    if (section) seen.observe(section);
  }
}
// Copy the text of what a button names.
for (const button of document.querySelectorAll('[data-copy]')) {
  button.addEventListener('click', async () => {
    const source = document.getElementById(button.dataset.copy);
    const label = button.textContent;
    try {
      await navigator.clipboard.writeText(source.innerText);
      button.textContent = 'Copied';
    } catch {  // not allowed here: leave it selected for the keyboard
      const range = document.createRange();
      range.selectNodeContents(source);
      getSelection().removeAllRanges();
      getSelection().addRange(range);
      button.textContent = 'Selected: press Ctrl+C';
    }
    setTimeout(() => { button.textContent = label; }, 2500);
  });
}
// Cards that were never seen have estimated heights: what is jumped to is held in place while those above it get their own.
{
  let frames = 0;
  const hold = () => {
    const target = frames-- > 0 && document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (!target) return;
    target.scrollIntoView({ behavior: 'instant' });
    requestAnimationFrame(hold);
  };
  const begin = () => { frames = 30; requestAnimationFrame(hold); };
  addEventListener('hashchange', begin);
  addEventListener('load', begin);
  for (const link of document.querySelectorAll('a[href^="#"]')) link.addEventListener('click', begin);
  for (const own of ['wheel', 'touchstart', 'pointerdown', 'keydown']) {
    addEventListener(own, () => { frames = 0; }, { passive: true });
  }
}
