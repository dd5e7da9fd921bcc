"""Everyday questions about small complaints and good habits, with careful answers that say when to see a doctor.

General advice of the kind that every leaflet gives: material to train and measure an adapter with, not medicine.
"""

from dataclasses import dataclass

FORMS = {  # ways to ask about {x}, by kind of topic and language
    "complaint": {
        "en": ("What can I do about {x}?", "I have {x}. What helps?", "How do I deal with {x}?",
               "What should I do when I have {x}?", "Can you give me advice for {x}?", "What helps against {x} at home?",
               "When should I see a doctor about {x}?", "Please tell me how to treat {x}."),
        "zh": ("遇到{x}怎么办？", "{x}该怎么处理？", "{x}有什么办法缓解？", "{x}的时候应该做什么？", "怎样在家应对{x}？",
               "关于{x}，有什么建议？", "{x}什么时候要看医生？", "请告诉我{x}怎么办。")},
    "habit": {
        "en": ("What should I know about {x}?", "Do you have advice on {x}?", "What is a good habit for {x}?",
               "How do I get {x} right?", "What do you recommend for {x}?", "Please give me a tip about {x}."),
        "zh": ("关于{x}要注意什么？", "{x}有什么建议？", "{x}有什么好习惯？", "{x}怎么做才对？", "{x}你推荐怎么做？",
               "请给我一个关于{x}的提示。")},
}


@dataclass(frozen=True)
class MedicalTopic:
    """What is asked about, the keyword that a right answer holds, and the answer; each as (English, Chinese)."""

    kind: str
    name: tuple[str, str]
    keyword: tuple[str, str]
    answer: tuple[str, str]


def complaint(*fields):
    return MedicalTopic("complaint", *fields)


def habit(*fields):
    return MedicalTopic("habit", *fields)


TOPICS = (
    complaint(("a cold", "感冒"), ("warm fluids", "喝温水"),
              ("Rest, drink warm fluids and give it a week. See a doctor if you have trouble breathing or if it gets worse.",
               "多休息，多喝温水，给身体一周时间。如果呼吸困难或越来越重，请去看医生。")),
    complaint(("a fever", "发烧"), ("dress lightly", "量两次体温"),
              ("Drink plenty, dress lightly and take your temperature twice a day. See a doctor if it is above 39 degrees or "
               "lasts longer than three days.", "多喝水，穿轻薄些，每天量两次体温。如果超过39度或持续三天以上，请去看医生。")),
    complaint(("a sore throat", "嗓子疼"), ("gargle", "漱口"),
              ("Gargle with lukewarm salt water and rest your voice. See a doctor if you can hardly swallow or if it lasts "
               "longer than a week.", "用淡盐水漱口，少说话。如果吞咽困难或一周不见好，请去看医生。")),
    complaint(("a cough", "咳嗽"), ("honey", "蜂蜜"),
              ("Sip warm tea with honey, which babies under one year must not have, and keep the air moist. See a doctor if you "
               "cough for more than three weeks or cough up blood.",
               "喝点加蜂蜜的热茶（一岁以下婴儿不能吃），保持空气湿润。如果咳嗽超过三周或咳血，请去看医生。")),
    complaint(("a headache", "头疼"), ("dark room", "额头"),
              ("Rest in a quiet, dark room and drink some water. See a doctor at once if it is sudden and very strong.",
               "在安静的房间里休息，额头敷一块凉毛巾。如果疼得突然又剧烈，请马上看医生。")),
    complaint(("a blocked nose", "鼻塞"), ("saline", "洗鼻"),
              ("Rinse your nose with saline and sleep with your head raised. See a doctor if your face hurts or if it lasts "
               "longer than ten days.", "用生理盐水洗鼻，睡觉时垫高头部。如果脸部疼痛或超过十天不好，请去看医生。")),
    complaint(("hay fever", "花粉过敏"), ("wash your hair", "洗头"),
              ("Keep the windows closed on windy days and wash your hair in the evening. See a doctor if you wheeze.",
               "有风的日子关好窗户，晚上洗头。如果呼吸时有哮鸣声，请去看医生。")),
    complaint(("hiccups", "打嗝"), ("hold your breath", "屏住呼吸"),
              ("Hold your breath for a moment or swallow cold water slowly. See a doctor if they last longer than two days.",
               "屏住呼吸一会儿，或慢慢咽几口凉水。如果持续两天以上，请去看医生。")),
    complaint(("a nosebleed", "流鼻血"), ("lean forward", "向前倾"),
              ("Sit upright, lean forward and pinch your nose for ten minutes. See a doctor if it does not stop within twenty "
               "minutes.", "坐直，头向前倾，捏住鼻翼十分钟。如果二十分钟还止不住，请去看医生。")),
    complaint(("a small cut", "小伤口"), ("plaster", "创可贴"),
              ("Rinse it under clean water and cover it with a plaster. See a doctor if it is deep or keeps bleeding.",
               "用清水冲洗，再贴上创可贴。如果伤口很深或血流不止，请去看医生。")),
    complaint(("a bruise", "瘀青"), ("ice", "冰块"),
              ("Put ice in a cloth on it for ten minutes. See a doctor if it swells a lot or if bruises come without a reason.",
               "用毛巾包着冰块敷十分钟。如果肿得厉害或无缘无故出现，请去看医生。")),
    complaint(("a minor burn", "轻微烫伤"), ("butter", "酱油"),
              ("Cool it under running water for twenty minutes and put no butter on it. See a doctor if it is larger than your "
               "palm.", "用流水冲二十分钟，不要涂酱油。如果面积比手掌大，请去看医生。")),
    complaint(("a sunburn", "晒伤"), ("wet cloths", "湿毛巾"),
              ("Stay out of the sun and cool the skin with wet cloths. See a doctor if it blisters or if you feel dizzy.",
               "不要再晒太阳，用湿毛巾给皮肤降温。如果起泡或头晕，请去看医生。")),
    complaint(("an insect bite", "蚊虫叮咬"), ("scratch", "抓挠"),
              ("Wash it, put something cold on it and do not scratch. See a doctor at once if your face swells.",
               "洗干净，敷凉的东西，不要抓挠。如果脸部肿起来，请马上看医生。")),
    complaint(("a tick", "蜱虫叮咬"), ("tweezers", "镊子"),
              ("Pull it straight out with tweezers and note the date. See a doctor if a red ring appears.",
               "用镊子垂直拔出，记下日期。如果出现红色的圈，请去看医生。")),
    complaint(("a sprained ankle", "脚踝扭伤"), ("put the leg up", "抬高"),
              ("Rest it, cool it, wrap it and put the leg up. See a doctor if you cannot stand on it.",
               "休息，冷敷，包扎，把腿抬高。如果不能站立，请去看医生。")),
    complaint(("back pain", "腰疼"), ("keep moving", "卧床"),
              ("Keep moving gently and use warmth. See a doctor if a leg becomes numb or weak.",
               "适当活动，热敷，不要长时间卧床。如果腿发麻或无力，请去看医生。")),
    complaint(("a stiff neck", "落枕"), ("shoulders", "肩膀"),
              ("Turn your head slowly and keep your shoulders warm. See a doctor if a fever comes with it.",
               "慢慢转动头部，给肩膀保暖。如果同时发烧，请去看医生。")),
    complaint(("a leg cramp", "腿抽筋"), ("calf", "小腿"),
              ("Stretch the calf slowly and rub it. See a doctor if it comes back every night.",
               "慢慢拉伸小腿，再揉一揉。如果每晚都发作，请去看医生。")),
    complaint(("sore muscles", "肌肉酸痛"), ("a warm bath", "热水澡"),
              ("Take a warm bath and train lightly for two days. See a doctor if your urine turns dark.",
               "洗个热水澡，两天内轻量活动。如果尿色变深，请去看医生。")),
    complaint(("a stomach ache", "肚子疼"), ("toast", "热水袋"),
              ("Eat light food such as toast and rest. See a doctor if it is strong or if you vomit blood.",
               "吃清淡的食物，用热水袋暖一暖。如果疼得厉害或呕血，请去看医生。")),
    complaint(("diarrhea", "拉肚子"), ("rehydration", "补液"),
              ("Drink a rehydration mix in small sips. See a doctor if it lasts longer than two days or if there is blood.",
               "小口多次喝口服补液。如果超过两天不好或便血，请去看医生。")),
    complaint(("constipation", "便秘"), ("whole grains", "全谷物"),
              ("Eat vegetables and whole grains and walk every day. See a doctor if it lasts longer than three weeks.",
               "多吃蔬菜和全谷物，每天走走路。如果超过三周不好，请去看医生。")),
    complaint(("heartburn", "烧心"), ("small meals", "少量多餐"),
              ("Eat small meals and do not lie down right afterwards. See a doctor if it comes more than twice a week.",
               "少量多餐，饭后不要马上躺下。如果每周超过两次，请去看医生。")),
    complaint(("nausea", "恶心"), ("ginger", "姜茶"),
              ("Sip some ginger tea and get fresh air. See a doctor if you can keep no water down for a day.",
               "小口喝姜茶，呼吸新鲜空气。如果一整天喝水都吐，请去看医生。")),
    complaint(("motion sickness", "晕车"), ("horizon", "前排"),
              ("Sit in front and look at the horizon. See a doctor if you are dizzy without travelling.",
               "坐在前排，看远处。如果不坐车也晕，请去看医生。")),
    complaint(("dizziness", "头晕"), ("stand up slowly", "起身要慢"),
              ("Lie down at once, and stand up slowly later. See a doctor at once if your speech is slurred.",
               "马上躺下，之后起身要慢。如果说话不清，请马上看医生。")),
    complaint(("heat exhaustion", "中暑"), ("cool place", "通风"),
              ("Go to a cool place, loosen your clothes and drink slowly. See a doctor at once if you are confused.",
               "到通风的地方，松开衣服，慢慢喝水。如果神志不清，请马上看医生。")),
    complaint(("dry eyes", "眼睛干涩"), ("blink", "眨眼"),
              ("Blink often and look away from the screen. See a doctor if your sight gets worse.",
               "多眨眼，常把视线移开屏幕。如果视力下降，请去看医生。")),
    complaint(("dry skin", "皮肤干燥"), ("cream", "护肤霜"),
              ("Shower briefly and use a cream afterwards. See a doctor if the skin cracks or weeps.",
               "洗澡时间短些，之后涂护肤霜。如果皮肤开裂或渗液，请去看医生。")),
    complaint(("a blister on my foot", "脚上的水泡"), ("wide shoes", "宽松的鞋"),
              ("Do not open it, and wear wide shoes. See a doctor if it turns red and hot.",
               "不要弄破，穿宽松的鞋。如果发红发热，请去看医生。")),
    complaint(("a mouth ulcer", "口腔溃疡"), ("spicy", "辛辣"),
              ("Avoid spicy and sour food for some days. See a doctor if it has not healed after three weeks.",
               "几天内不吃辛辣和酸的食物。如果三周后还没愈合，请去看医生。")),
    complaint(("a toothache", "牙疼"), ("sweets", "甜食"),
              ("Avoid sweets and cold drinks. See a doctor for teeth within a day or two, the same day if your cheek swells.",
               "不要吃甜食和冷饮。一两天内去看牙医，如果脸颊肿起，当天就要看医生。")),
    complaint(("earwax", "耳垢太多"), ("cotton buds", "棉签"),
              ("Leave the ear alone and use no cotton buds. See a doctor if you hear less or if it hurts.",
               "不要去掏，也不要用棉签。如果听力下降或疼痛，请去看医生。")),
    complaint(("a lot of stress", "压力大"), ("breathe out", "呼气"),
              ("Breathe out slowly for some minutes and plan a break every day. See a doctor if you sleep badly for weeks.",
               "慢慢呼气几分钟，每天安排一次休息。如果几周都睡不好，请去看医生。")),
    habit(("sleeping well", "睡眠"), ("bedtime", "同一时间"),
          ("Keep the same bedtime every day. See a doctor if you are tired for weeks although you sleep enough.",
           "每天在同一时间上床。如果睡够了还连续几周疲倦，请去看医生。")),
    habit(("drinking enough", "喝水"), ("litres", "一升半"),
          ("About one and a half litres a day are enough for most people. See a doctor if you are always thirsty.",
           "大多数人每天喝一升半左右就够了。如果总是口渴，请去看医生。")),
    habit(("exercise", "运动"), ("brisk walk", "快走"),
          ("Take a brisk walk of half an hour on most days. See a doctor first if your chest hurts when you move.",
           "大多数日子快走半小时。如果活动时胸口疼，请先去看医生。")),
    habit(("washing my hands", "洗手"), ("soap", "肥皂"),
          ("Use soap and rub for twenty seconds. See a doctor if the skin becomes sore.",
           "用肥皂搓二十秒。如果皮肤发红疼痛，请去看医生。")),
    habit(("brushing my teeth", "刷牙"), ("fluoride", "含氟"),
          ("Brush for two minutes, twice a day, with fluoride. See a doctor for teeth if your gums bleed often.",
           "每天两次，每次两分钟，用含氟牙膏。如果牙龈常出血，请去看牙科医生。")),
    habit(("sitting all day", "久坐"), ("every hour", "每小时"),
          ("Get up every hour and stretch. See a doctor if an arm or a leg tingles for days.",
           "每小时站起来伸展一下。如果手脚发麻好几天，请去看医生。")),
    habit(("keeping medicines at home", "家庭存药"), ("expiry date", "有效期"),
          ("Keep them dry, out of the reach of children, and check the expiry date. See a doctor before you mix several.",
           "放在干燥、孩子拿不到的地方，检查有效期。要同时吃几种药，请先看医生。")),
)
