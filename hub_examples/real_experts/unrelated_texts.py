"""Text that has nothing to do with the four skills: how far is an expert's view from the expert there?"""

from tiny_experts.example import Example

INSTRUCTIONS = (
    Example("Name three things that plants need.", "Plants need light, water and air to grow."),
    Example("Give me a tip for sleeping better.", "Go to bed at the same time every night and keep the room dark."),
    Example("What does a librarian do?", "A librarian helps people find books and keeps the collection in order."),
    Example("Write a short greeting for a birthday card.", "Happy birthday! May the coming year bring you much joy."),
    Example("Why is the sky blue?", "Air scatters the blue part of sunlight more than the red part."),
    Example("Suggest a name for a small bakery.", "You could call it The Golden Crust."),
    Example("How do I keep bread fresh?", "Wrap it in a cloth and store it in a dry, cool place."),
    Example("Describe a forest in autumn.", "Red and yellow leaves cover the path, and the air smells of rain."),
    Example("What is a proverb about patience?", "Good things come to those who wait."),
    Example("Explain what a budget is.", "A budget is a plan of what you earn and what you spend."),
    Example(
        "What should I pack for a walk in the mountains?", "Take warm clothes, water, a map and something to eat."
    ),
    Example(
        "Who was Marie Curie?", "She was a physicist and chemist who studied radioactivity and won two Nobel Prizes."
    ),
    Example("Write one line of a poem about the sea.", "The sea keeps every secret that the moon has told it."),
    Example("How can I thank a colleague?", "Tell them what they did, why it helped you, and that you are grateful."),
    Example("What is the difference between a frog and a toad?", "Frogs have smooth, moist skin; toads are dry."),
    Example("Give advice to a nervous speaker.", "Breathe slowly, look at a friendly face, and begin with a pause."),
    Example("What causes tides?", "The gravity of the moon and the sun pulls the water of the oceans."),
    Example("How do bees make honey?", "They collect nectar, carry it to the hive, and let its water evaporate."),
    Example("Is it rude to arrive early?", "A few minutes early is polite, but much earlier can disturb the host."),
    Example(
        "What is the purpose of a vaccine?", "It teaches the immune system to recognise a disease before it strikes."
    ),
    Example("Summarise the story of Cinderella.", "A mistreated girl goes to a ball and is found by a lost shoe."),
    Example("How should I water a cactus?", "Water it rarely, and let the soil dry out completely in between."),
    Example("What makes a good leader?", "A good leader listens, decides, and takes responsibility for mistakes."),
    Example("Recommend a hobby for rainy days.", "Try drawing, baking, or learning to play an instrument."),
    Example("What is democracy?", "It is a form of government in which the people choose who rules."),
    Example("Why do cats purr?", "Cats purr when they are content, and sometimes to calm themselves."),
    Example("Write a polite refusal.", "Thank you for the invitation, but I am afraid I cannot come."),
    Example("How do volcanoes form?", "Melted rock rises through cracks in the crust and builds up at the surface."),
)

PROSE = (
    "The old bridge had carried carts and travellers across the river for longer than anyone could remember.",
    "When the rain stopped, children ran out into the street and jumped from puddle to puddle.",
    "She closed the letter, put it back into the drawer, and never spoke of it again.",
    "Most birds that breed in the far north fly south before the first snow falls.",
    "The committee postponed its decision because several members had not read the report.",
    "In the middle of the night a fire broke out in the kitchen of the hotel, but nobody was hurt.",
    "Steel is made by removing carbon and other impurities from molten iron.",
    "He had always wanted to be a painter, yet he spent his life behind a desk.",
    "The museum will be closed for repairs until the end of the summer.",
    "Fresh herbs should be added at the end of cooking, so that they keep their taste.",
    "Languages change slowly, and each generation complains about the next.",
    "Behind the house there was a garden with apple trees and a well that had run dry.",
    "The patient was advised to rest, drink enough, and return if the fever came back.",
    "Trade along the coast grew quickly once the harbour had been deepened.",
    "A good map leaves out more than it shows, and this is why it can be read.",
    "They argued until late about the film, which neither of them had liked.",
    "The orchestra tuned its instruments while the audience was still looking for its seats.",
    "Glass is neither quite a solid nor a liquid, and it breaks without warning.",
    "Nobody noticed that the clock in the hall had stopped on the day of the wedding.",
    "Farmers in the valley plant beans beside the maize, since each helps the other to grow.",
)
