// Sort and filter the cards of lesions. A card's figures are in data-values, in the order of the options of #sort.
{
  const list = document.querySelector('.gallery');
  const sort = document.getElementById('sort');
  if (list && sort) {
    const cards = [...list.children].map((node) => ({
      node,
      values: JSON.parse(node.dataset.values),
      group: node.dataset.group,
      text: node.dataset.text.toLowerCase(),
    }));
    const group = document.getElementById('group');
    const text = document.getElementById('text');
    const count = document.getElementById('count');
    const order = () => {
      const option = sort.selectedOptions[0];
      const [column, sign] = [Number(option.dataset.column), Number(option.dataset.sign)];
      const known = (value) => value !== null;
      cards.sort((a, b) => {
        const [x, y] = [a.values[column], b.values[column]];
        if (known(x) !== known(y)) return known(x) ? -1 : 1;  // what has no value comes last
        return known(x) && x !== y ? (x < y ? -sign : sign) : 0;
      });
      list.append(...cards.map((card) => card.node));
    };
    const filter = () => {
      const wanted = text.value.trim().toLowerCase();
      let shown = 0;
      for (const card of cards) {
        const fits = (!group.value || card.group === group.value) && card.text.includes(wanted);
        card.node.hidden = !fits;
        shown += fits;
      }
      count.textContent = `${shown} of ${cards.length} lesions shown`;
    };
    sort.addEventListener('change', order);
    group.addEventListener('change', filter);
    text.addEventListener('input', filter);
    filter();
  }
}
