// Draws every chart of the page in its place. Each figure keeps its view, for whoever looks from the console.
for (const figure of document.querySelectorAll("figure")) {
  const place = figure.querySelector(".chart");
  const spec = JSON.parse(figure.querySelector("script").textContent);
  draw(place, spec, Math.max(1, Math.floor((place.clientWidth - 90) / 95)))
    .then((drawn) => { figure.view = drawn.view; })
    .catch((error) => {
      place.textContent = "This chart could not be drawn: " + error.message;
      console.error(error);
    });
}

// A legend does not wrap by itself: it gets as many columns as there is room for.
async function draw(place, spec, columns) {
  spec.config.legend.columns = columns;
  const drawn = await vegaEmbed(place, spec, { renderer: "svg", actions: false });
  const legend = place.querySelector(".role-legend");
  const edge = place.getBoundingClientRect().right;
  if (columns === 1 || !legend || legend.getBoundingClientRect().right <= edge) return drawn;
  drawn.finalize();
  return draw(place, spec, columns - 1);
}
