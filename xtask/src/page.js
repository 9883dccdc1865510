// What is wrong with a page of peer-copy as it is shown now: a list of sentences, empty where nothing is.
(() => {
  const problems = [];
  const width = document.documentElement.clientWidth;
  const slack = 1;
  const shown = (element) => element.getClientRects().length > 0;
  const name = (element) => (element.textContent || element.className.baseVal || element.className).trim().slice(0, 40);

  if (document.documentElement.scrollWidth > width)
    problems.push(`the page is ${document.documentElement.scrollWidth} wide in a window of ${width}`);

  // Nothing but what scrolls by itself leaves the window, and no line of text is cut.
  for (const element of document.querySelectorAll("h1, h2, p, li, figure, summary, .scroll")) {
    const box = element.getBoundingClientRect();
    if (shown(element) && (box.left < -slack || box.right > width + slack))
      problems.push(`"${name(element)}" reaches from ${box.left} to ${box.right} of ${width}`);
  }

  const rgb = (text) => (text.match(/[\d.]+/g) || []).slice(0, 3).map(Number);
  const luminance = (text) => {
    const [r, g, b] = rgb(text).map((part) => {
      const share = part / 255;
      return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const contrast = (one, other) => {
    const [low, high] = [luminance(one), luminance(other)].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  };
  // What WCAG 2.2 asks of text (1.4.3), and of what has to be told apart (1.4.11).
  const back = (element) => {
    for (let one = element; one; one = one.parentElement) {
      const colour = getComputedStyle(one).backgroundColor;
      if (colour !== "rgba(0, 0, 0, 0)") return colour;
    }
    return "rgb(255, 255, 255)";
  };
  for (const element of document.querySelectorAll("h1, p, td, th, figcaption, summary, small")) {
    const ratio = contrast(getComputedStyle(element).color, back(element));
    if (ratio < 4.5) problems.push(`"${name(element)}" has a contrast of ${ratio.toFixed(1)}`);
  }

  const plots = [...document.querySelectorAll(".plot")];
  for (const plot of plots) {
    const title = name(plot.querySelector("figcaption"));
    const say = (what) => problems.push(`plot "${title}": ${what}`);
    const box = plot.getBoundingClientRect();
    const inside = plot.querySelector("svg").getBoundingClientRect();
    if (inside.width < 150 || inside.height < 100) say(`it is ${inside.width} by ${inside.height}`);

    const texts = [...plot.querySelectorAll("text")].filter(shown);
    if (texts.length < 3) say(`it has ${texts.length} labels`);
    const boxes = texts.map((text) => text.getBoundingClientRect());
    boxes.forEach((one, index) => {
      if (one.height < 11) say(`"${name(texts[index])}" is ${one.height} high`);
      if (one.left < box.left - slack || one.right > box.right + slack || one.top < box.top - slack || one.bottom > box.bottom + slack)
        say(`"${name(texts[index])}" leaves it`);
      boxes.slice(0, index).forEach((other, before) => {
        const across = Math.min(one.right, other.right) - Math.max(one.left, other.left);
        const down = Math.min(one.bottom, other.bottom) - Math.max(one.top, other.top);
        // Boxes are as high as their lines, letters are not.
        if (across > slack && down > 3) say(`"${name(texts[before])}" and "${name(texts[index])}" overlap`);
      });
    });

    const marks = [...plot.querySelectorAll(".mark")];
    if (!marks.length) say("it has no marks");
    for (const mark of marks) {
      const one = mark.getBoundingClientRect();
      const [x, y] = [(one.left + one.right) / 2, (one.top + one.bottom) / 2];
      if (one.width < 4 || one.height < 4) say(`a mark is ${one.width} by ${one.height}`);
      if (x < inside.left - slack || x > inside.right + slack || y < inside.top - 2 || y > inside.bottom + 2)
        say(`a mark at ${x}, ${y} lies outside of its scales`);
      if (contrast(getComputedStyle(mark).stroke, back(plot)) < 3) say(`the colour ${getComputedStyle(mark).stroke} is faint`);
    }
  }

  const wrong = document.querySelector(".verdict.wrong");
  return {
    problems: [...new Set(problems)].slice(0, 20),
    plots: plots.length,
    crosses: document.querySelectorAll(".plot .bad").length,
    wrong_at: wrong ? wrong.getBoundingClientRect().top : null,
  };
})()
