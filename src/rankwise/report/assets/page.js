// Draws every chart of the page in its place. Each figure keeps its view, for whoever looks from the console.
for (const figure of document.querySelectorAll("figure")) {
  const place = figure.querySelector(".chart");
  const spec = JSON.parse(figure.querySelector("script").textContent);
  // A legend does not wrap by itself: give it as many columns as there is room for.
  spec.config.legend.columns = Math.max(1, Math.floor(place.clientWidth / 110));
  vegaEmbed(place, spec, { renderer: "svg", actions: false })
    .then((drawn) => { figure.view = drawn.view; })
    .catch((error) => {
      place.textContent = "This chart could not be drawn: " + error.message;
      console.error(error);
    });
}
