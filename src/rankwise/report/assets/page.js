// Draws every chart of the page in its place. Each figure keeps its view, for whoever looks from the console.
for (const figure of document.querySelectorAll("figure")) {
  const place = figure.querySelector(".chart");
  if (!place) continue;
  const spec = JSON.parse(figure.querySelector("script").textContent);
  vegaEmbed(place, spec, { renderer: "svg", actions: false })
    .then((drawn) => { figure.view = drawn.view; })
    .catch((error) => {
      place.textContent = "This chart could not be drawn: " + error.message;
      console.error(error);
    });
}
