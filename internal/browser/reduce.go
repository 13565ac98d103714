package browser

import (
	"bytes"
	"cmp"
	"image"
	"image/color"
	"image/draw"
	"image/png"
	"maps"
	"slices"
)

// reduce gives a picture at most 256 colours, which makes its file about a third as big. A page has few colours and many
// shades of the edges of letters, so the most frequent colours are kept and the others take the nearest of them.
func reduce(shot []byte) (*image.Paletted, error) {
	decoded, err := png.Decode(bytes.NewReader(shot))
	if err != nil {
		return nil, err
	}
	bounds := decoded.Bounds()
	picture := image.NewRGBA(bounds)
	draw.Draw(picture, bounds, decoded, bounds.Min, draw.Src)
	frequency := map[color.RGBA]int{}
	for y := bounds.Min.Y; y < bounds.Max.Y; y++ {
		for x := bounds.Min.X; x < bounds.Max.X; x++ {
			frequency[picture.RGBAAt(x, y)]++
		}
	}
	// Ties are broken by the colour, so that the same picture makes the same file.
	byFrequency := slices.SortedFunc(maps.Keys(frequency), func(a, b color.RGBA) int {
		return cmp.Or(cmp.Compare(frequency[b], frequency[a]), bytes.Compare([]byte{a.R, a.G, a.B}, []byte{b.R, b.G, b.B}))
	})
	var palette color.Palette
	for _, c := range byFrequency {
		// Rare shades that are nearly there already would crowd out others.
		if len(palette) == 256 || len(palette) > 16 && near(palette, c) {
			continue
		}
		palette = append(palette, c)
	}
	reduced := image.NewPaletted(bounds, palette)
	index := make(map[color.RGBA]uint8, len(frequency))
	for c := range frequency {
		index[c] = uint8(palette.Index(c))
	}
	for y := bounds.Min.Y; y < bounds.Max.Y; y++ {
		for x := bounds.Min.X; x < bounds.Max.X; x++ {
			reduced.SetColorIndex(x, y, index[picture.RGBAAt(x, y)])
		}
	}
	return reduced, nil
}

// near reports whether a colour cannot be told from one that a palette has.
func near(palette color.Palette, c color.RGBA) bool {
	const close = 10
	p := palette[palette.Index(c)].(color.RGBA)
	distance := func(a, b uint8) int { return max(int(a), int(b)) - min(int(a), int(b)) }
	return distance(p.R, c.R)+distance(p.G, c.G)+distance(p.B, c.B) < close
}
