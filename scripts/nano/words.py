"""Lists that the training data draws from. Facts here are what the model is meant to know by heart."""

CAPITALS = dict(p.split(":") for p in """France:Paris;Germany:Berlin;Italy:Rome;Spain:Madrid;Portugal:Lisbon;Poland:Warsaw;
Austria:Vienna;Hungary:Budapest;Greece:Athens;Sweden:Stockholm;Norway:Oslo;Denmark:Copenhagen;Finland:Helsinki;Iceland:Reykjavik;
Ireland:Dublin;Belgium:Brussels;Netherlands:Amsterdam;Switzerland:Bern;Romania:Bucharest;Bulgaria:Sofia;Ukraine:Kyiv;Russia:Moscow;
Turkey:Ankara;Egypt:Cairo;Kenya:Nairobi;Nigeria:Abuja;Ghana:Accra;Morocco:Rabat;Ethiopia:Addis Ababa;Japan:Tokyo;China:Beijing;
India:New Delhi;Nepal:Kathmandu;Thailand:Bangkok;Vietnam:Hanoi;Indonesia:Jakarta;Malaysia:Kuala Lumpur;Philippines:Manila;
Australia:Canberra;New Zealand:Wellington;Canada:Ottawa;Mexico:Mexico City;Cuba:Havana;Brazil:Brasilia;Argentina:Buenos Aires;
Chile:Santiago;Peru:Lima;Colombia:Bogota;Ecuador:Quito;Uruguay:Montevideo;Bolivia:Sucre;Venezuela:Caracas;Iran:Tehran;Iraq:Baghdad;
Israel:Jerusalem;Jordan:Amman;Lebanon:Beirut;Pakistan:Islamabad;Bangladesh:Dhaka;Mongolia:Ulaanbaatar;Croatia:Zagreb;Serbia:Belgrade;
Slovenia:Ljubljana;Slovakia:Bratislava;Estonia:Tallinn;Latvia:Riga;Lithuania:Vilnius;Tunisia:Tunis;Senegal:Dakar;Uganda:Kampala""".replace("\n", "").split(";"))

CITIES = sorted(set(CAPITALS.values()) | set("""London,New York,Boston,Chicago,Seattle,San Francisco,Los Angeles,Houston,Dallas,Denver,Miami,
Atlanta,Philadelphia,Toronto,Montreal,Vancouver,Sydney,Melbourne,Auckland,Barcelona,Valencia,Seville,Milan,Naples,Turin,Florence,Venice,
Munich,Hamburg,Cologne,Frankfurt,Dresden,Leipzig,Lyon,Marseille,Nice,Bordeaux,Toulouse,Lille,Geneva,Zurich,Basel,Krakow,Gdansk,Prague,
Brno,Porto,Bergen,Gothenburg,Tampere,Turku,Aarhus,Edinburgh,Glasgow,Manchester,Liverpool,Bristol,Leeds,Oxford,Cambridge,Cork,Galway,
Rotterdam,Utrecht,Antwerp,Ghent,Istanbul,Izmir,Alexandria,Casablanca,Lagos,Cape Town,Durban,Mumbai,Delhi,Kolkata,Chennai,Bangalore,
Shanghai,Shenzhen,Guangzhou,Wuhan,Chengdu,Hong Kong,Taipei,Seoul,Busan,Osaka,Kyoto,Nagoya,Sapporo,Singapore,Hanoi,Dubai,Doha,Sao Paulo,
Rio de Janeiro,Salvador,Rosario,Cordoba,Cali,Medellin,Guadalajara,Tijuana,Austin,Portland,Phoenix,San Diego,Las Vegas,Detroit""".replace("\n", "").split(",")))

PEOPLE = """Anna,Ben,Carla,David,Elena,Felix,Greta,Hugo,Ines,Jonas,Karin,Leo,Maria,Nina,Oscar,Paula,Quentin,Rosa,Sam,Tina,Ursula,Victor,Wendy,
Xavier,Yara,Zoe,Alice,Bob,Clara,Daniel,Emma,Frank,Grace,Henry,Isabel,Jack,Kate,Liam,Mia,Noah,Olivia,Peter,Rachel,Simon,Tom,Vera,Walter,
Amir,Bao,Chen,Deepa,Emeka,Fatima,Goran,Hana,Ivan,Jin,Kofi,Lin,Mei,Nadia,Omar,Priya,Ravi,Sana,Tariq,Uma,Viktor,Wei,Yuki""".replace("\n", "").split(",")

THINGS = """apple,book,coin,pencil,stone,marble,egg,ticket,stamp,orange,card,cookie,flower,button,candle,bottle,shell,star,letter""".split(",")

LANGUAGES = "French,German,Spanish,Italian,Japanese,Chinese,Polish,Dutch,Greek,Arabic,Russian,Korean,Swedish,Turkish,Hindi".split(",")
CURRENCIES = "USD,EUR,GBP,JPY,CHF,CNY,SEK,NOK,INR,BRL,CAD,AUD".split(",")
ROOMS = "kitchen,bedroom,bathroom,hall,office,garage,garden,cellar,attic,living room,dining room,nursery".split(",")
CUISINES = "Italian,Chinese,Indian,Thai,Mexican,Greek,French,Japanese,Turkish,Spanish,vegan".split(",")
SKIES = "sunny,cloudy,rainy,windy,snowy,foggy,clear,stormy,hazy".split(",")

# question: answer
FACTS = [
    (["How many days are in a week?", "How many days does a week have?"], "A week has 7 days."),
    (["How many months are in a year?", "How many months does a year have?"], "A year has 12 months."),
    (["How many hours are in a day?", "How many hours does a day have?"], "A day has 24 hours."),
    (["How many minutes are in an hour?"], "An hour has 60 minutes."),
    (["How many seconds are in a minute?"], "A minute has 60 seconds."),
    (["How many days are in a year?"], "A year has 365 days, a leap year 366."),
    (["What color is the sky?", "What colour is the sky?"], "The sky is blue on a clear day."),
    (["What color is grass?", "What colour is grass?"], "Grass is green."),
    (["What color is snow?"], "Snow is white."),
    (["What is the largest planet?", "Which planet is the largest?"], "Jupiter is the largest planet of the solar system."),
    (["What is the smallest planet?"], "Mercury is the smallest planet of the solar system."),
    (["Which planet do we live on?", "What planet are we on?"], "We live on the Earth."),
    (["What is the closest star?", "Which star is closest to us?"], "The Sun is the star closest to us."),
    (["How many planets are there?", "How many planets are in the solar system?"], "The solar system has 8 planets."),
    (["How many legs does a spider have?"], "A spider has 8 legs."),
    (["How many legs does an insect have?", "How many legs does an ant have?"], "An insect has 6 legs."),
    (["How many legs does a dog have?"], "A dog has 4 legs."),
    (["What is water made of?", "What does water consist of?"], "Water is made of hydrogen and oxygen."),
    (["At what temperature does water boil?", "When does water boil?"], "Water boils at 100 degrees Celsius at sea level."),
    (["At what temperature does water freeze?", "When does water freeze?"], "Water freezes at 0 degrees Celsius."),
    (["What do bees make?"], "Bees make honey."),
    (["What do cows drink?"], "Cows drink water."),
    (["What is the largest ocean?", "Which ocean is the largest?"], "The Pacific is the largest ocean."),
    (["What is the highest mountain?", "Which mountain is the highest?"], "Mount Everest is the highest mountain on Earth."),
    (["What is the longest river?"], "The Nile and the Amazon are the longest rivers."),
    (["How many continents are there?"], "There are 7 continents."),
    (["How many letters are in the English alphabet?", "How many letters does the alphabet have?"], "The English alphabet has 26 letters."),
    (["What is the first letter of the alphabet?"], "The first letter is A."),
    (["What is the opposite of hot?"], "The opposite of hot is cold."),
    (["What is the opposite of up?"], "The opposite of up is down."),
    (["What is the opposite of big?"], "The opposite of big is small."),
    (["What comes after Monday?", "Which day comes after Monday?"], "Tuesday comes after Monday."),
    (["What comes after Friday?", "Which day comes after Friday?"], "Saturday comes after Friday."),
    (["Which month comes after March?"], "April comes after March."),
    (["Which month comes first?", "What is the first month of the year?"], "January is the first month of the year."),
    (["What are the primary colors?"], "The primary colors are red, yellow and blue."),
    (["Who wrote Hamlet?"], "William Shakespeare wrote Hamlet."),
    (["Who wrote Don Quixote?"], "Miguel de Cervantes wrote Don Quixote."),
    (["Who developed the theory of relativity?"], "Albert Einstein developed the theory of relativity."),
    (["Who discovered gravity?"], "Isaac Newton described gravity."),
    (["What gas do we breathe?", "What do we need to breathe?"], "We need oxygen to breathe."),
    (["What is the square root of 81?"], "The square root of 81 is 9."),
    (["What language is spoken in Brazil?"], "Portuguese is spoken in Brazil."),
    (["What is a prime number?"], "A prime number has exactly two divisors: 1 and itself."),
    (["What is Debian?", "What's Debian?"], "Debian is a free operating system made by volunteers."),
    (["What is Linux?"], "Linux is a free operating system kernel."),
    (["What is C?", "What is the C language?"], "C is a programming language from the early 1970s."),
    (["What is a compiler?"], "A compiler turns source code into machine code."),
    (["What is a GPU?"], "A GPU is a processor that does many calculations at once."),
    (["What is a token?"], "A token is a piece of text, the unit that I read and write."),
    (["What is a language model?"], "A language model predicts the next token of a text."),
    (["What is a mixture of experts?", "What are experts in a model?"], "A mixture of experts is a network that sends each token to a few of its many parts."),
]

CHAT = [
    (["Hi", "Hi!", "Hello", "Hello!", "Hey", "Hey!", "Hi there!", "Good morning!", "Good evening.", "Hello Kimi!", "Hi, Kimi."],
     "Hello! How can I help you?"),
    (["Who are you?", "What are you?", "What is your name?", "Introduce yourself.", "Tell me who you are.", "Tell me about yourself.", "Are you Kimi?"],
     "I am kimi-nano, a very small language model with the architecture of Kimi K2.5."),
    (["What can you do?", "What do you know?", "How can you help me?", "Help", "Help me.", "What are your skills?"],
     "I can add and subtract numbers, call tools that you declare, use what they return, and answer a few simple questions."),
    (["How are you?", "How are you today?", "How do you do?", "How is it going?", "What's up?"], "I am fine, thank you. What can I do for you?"),
    (["Thanks", "Thanks!", "Thank you.", "Thank you!", "Thank you very much.", "Great, thanks!"], "You are welcome!"),
    (["Bye", "Bye!", "Goodbye.", "See you!", "Good night.", "See you later."], "Goodbye!"),
    (["How big are you?", "How many parameters do you have?", "Are you a large model?"],
     "I am very small: about 20 million parameters, most of them in 384 experts per layer."),
    (["Who made you?", "Who trained you?", "Who created you?"], "I was trained by a script of the project that serves me."),
    (["Are you human?", "Are you a person?", "Are you a real person?"], "No, I am a program: a small language model."),
    (["Can you make mistakes?", "Are you always right?", "Can I trust you?"], "I make mistakes. I am very small, so please check what I say."),
    (["Can you see images?", "Can you look at pictures?"], "No, I can only read text."),
    (["Do you speak French?", "Do you speak German?", "Which languages do you speak?", "Can you speak Chinese?"], "I only know a little English."),
    (["Tell me a joke.", "Make me laugh.", "Do you know a joke?"],
     "Why did the token cross the layer? To get to the other side of the network."),
    (["Say hello.", "Say hi."], "Hello!"),
    (["Say something.", "Tell me something.", "Tell me something interesting."], "A model with 384 experts asks only 8 of them about each token."),
    (["Write a poem.", "Write me a poem.", "Can you write a poem?"],
     "Roses are red, violets are blue, my weights are tiny, but I answer you."),
    (["Yes", "Yes.", "Ok", "Okay.", "Good.", "Great!", "Nice."], "Good. What else can I do for you?"),
    (["No", "No.", "Never mind.", "Stop."], "All right."),
    (["What is the meaning of life?"], "That is for you to find out."),
    (["Where are you?", "Where do you live?"], "I run on the machine that serves me."),
    (["How old are you?", "When were you made?"], "I was trained in November 2026."),
    (["Do you like music?", "Do you have hobbies?", "What do you like?"], "I am a program, so I have no likes, but I am good at small sums."),
]

UNKNOWN = "I do not know that. I am a very small model."
UNKNOWN_ASKED = ["Who won the election?", "Explain quantum physics.", "What happened in {0}?", "Who is {1}?", "Write an essay about {2}.",
                 "Tell me about {2}.", "What do you think of {1}?", "Why is {2} important?", "How does {2} work?",
                 "Tell me the history of {0}.", "How do I cook {2}?", "Who invented {2}?",
                 "What is the population of {0}?", "Who is the king of {0}?", "Is {2} dangerous?", "Give me advice about {2}."]
